"""The layers that a PEFT config names."""

import re
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any

from lora_lite.core.errors import listed


def named(fields: Mapping[str, Any], paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the paths that PEFT adapts by `target_modules`, in order, and what hinders an answer."""
    wanted, others = fields.get("target_modules"), fields.get("exclude_modules") or []
    if not wanted or wanted == "all-linear":
        return [], [f"target_modules: expected names or an expression, since the file has no tensors of a layer, found {wanted!r}"]
    whole = [rf"(^|.*\.){name}($|\..*)" for name in fields.get("modules_to_save") or []]
    asked = [p for p in paths if _fits(wanted, p) and (isinstance(wanted, str) or _in_blocks(fields, p))]
    return [p for p in asked if not _fits(others, p) and not any(re.match(name, p) for name in whole)], []


def _fits(names: Any, path: str) -> bool:
    """Whether an expression matches a path in full, or one of several names is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_blocks(fields: Mapping[str, Any], path: str) -> bool:
    """Whether `layers_to_transform` has the number of a layer's block: the first in its path, or that after a name of `layers_pattern`."""
    wanted, names = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    if wanted is None or wanted == []:
        return True
    starts = [rf"(?:^|.*?\.){name}" for name in ([names] if isinstance(names, str) else names)] or [r".*?\.[^.]*"]
    found = next((match["n"] for start in starts if (match := re.match(rf"{start}\.(?P<n>\d+)\.", path))), None)
    return found is not None and int(found) in ([wanted] if isinstance(wanted, int) else wanted)


def warn_of_absent(fields: Mapping[str, Any], paths: Iterable[str], present: Container[str]) -> None:
    """Warn of layers that `target_modules` names and of which the file has no tensors: a part of it may be missing."""
    absent = [path for path in named(fields, paths)[0] if path not in present]
    if absent:
        warnings.warn(
            f"from_peft: target_modules names {listed(absent)} too, of which the file has no tensors. They stay as the model has them. If "
            "the training adapted them, save the adapter again: a part of it is missing.",
            stacklevel=4,
        )


def expression(paths: Iterable[str]) -> str:
    """Return an expression of these paths and no others: PEFT matches one in full."""
    return "|".join(map(re.escape, paths))


def listed_or_expressed(paths: list[str], others: Iterable[str] | None) -> list[str] | str:
    """Return the layers as a list, which other readers of these files expect, or as an expression where a suffix would match others.

    So it might where the other paths are not known, which None stands for."""
    ends = tuple(f".{path}" for path in paths)
    return expression(paths) if paths and (others is None or any(path.endswith(ends) for path in others)) else paths
