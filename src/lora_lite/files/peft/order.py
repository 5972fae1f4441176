"""Patterns of a config whose order counts: PEFT sorts them when it saves, so that a file may not have it."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from lora_lite.core.errors import listed, several
from lora_lite.files.peft.fields import PATTERNS, of_patterns
from lora_lite.files.peft.hub import CONFIG
from lora_lite.files.peft.parts import Parts
from lora_lite.files.peft.row import Row

Chosen = dict[str, tuple[Row, Any]]
"""The row and the config of each layer that a file names."""


def warn_of_order(parts: Parts, chosen: Chosen) -> None:
    """Warn of layers whose values depend on the order of patterns, which the file may not have: PEFT sorts them when it saves."""
    fields, found = parts.fields, list[str]()
    for name, patterns in PATTERNS.get(fields["peft_type"], {}).items():
        unclear = [path for path in chosen if _unordered(fields, name, path)]
        ways = {path: [{**fields, patterns: {re.escape(path): value}} for value in of_patterns(fields, name, path)] for path in unclear}
        read = {path: [chosen[path][0].read(way, path, parts.layers[path]) for way in ways[path]] for path in unclear}
        differing = [path for path, values in read.items() if any(value != values[0] for value in values)]
        found += [f"{patterns} at {listed(differing)}"] if differing else []
    if found:
        warnings.warn(
            f"from_peft: expected one expression of a pattern to match a layer, found several with other values:\n{several(found)}\n"
            "The first in the file was taken, as PEFT does. But PEFT sorts them when it saves, and in training another may have been the "
            f"first. Put that one first in {CONFIG}.",
            stacklevel=4,
        )


def _unordered(fields: Mapping[str, Any], name: str, path: str) -> bool:
    """Whether patterns of several values match a layer, and their order may be that of the alphabet: PEFT sorts them when it saves."""
    patterns = list(fields.get(PATTERNS.get(fields["peft_type"], {}).get(name, "")) or {})
    return patterns == sorted(patterns) and len(set(of_patterns(fields, name, path))) > 1
