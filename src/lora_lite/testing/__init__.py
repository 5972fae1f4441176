"""The conformance kit: named checks that every variant must pass, and that users run on their own variants.

    from lora_lite.testing import check_variant
    check_variant(MyConfig(r=4))

Each check is one function of a `Case`, a layer with the variant on it and params moved off their start: at init most variants
are the identity and a wrong formula would pass. The checks compare `y - W x`, which a large `W x` would hide in `y`.
"""

import unittest
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from lora_lite.core.config import AdapterConfig, as_config
from lora_lite.testing._case import Case as Case
from lora_lite.testing._case import make_cases as make_cases
from lora_lite.testing._case import told
from lora_lite.testing._derivatives import forward_mode, gradients
from lora_lite.testing._formula import (
    acts,
    counts,
    deterministic,
    facts,
    identity,
    parts,
    positions,
    precision,
    proportional,
    pure,
    rows,
    shapes,
    steered,
    training,
    vmapped,
)
from lora_lite.testing._kind import KIND_CHECKS as KIND_CHECKS
from lora_lite.testing._kind import check_kind as check_kind
from lora_lite.testing._kind_case import KindCase as KindCase
from lora_lite.testing._kind_case import make_kind_case as make_kind_case
from lora_lite.testing._model import compiles, merged, mixed_batch, saved, stepped, untouched
from lora_lite.testing._quantised import quantised_4bit, quantised_8bit

__all__ = ["CHECKS", "KIND_CHECKS", "Case", "KindCase", "check_kind", "check_variant", "make_cases", "make_kind_case"]

CHECKS: dict[str, Callable[[AdapterConfig], None]] = {
    f.__name__: f
    for f in (
        *(facts, deterministic, parts, identity, acts, pure, gradients, forward_mode, vmapped, rows),
        *(merged, steered, proportional, positions, training, precision, shapes, counts, compiles, mixed_batch, saved, stepped, untouched),
        *(quantised_4bit, quantised_8bit),
    )
}
"""Every check by name, for a test that runs each on its own. A check that cannot run here raises `unittest.SkipTest` with
the reason, and pytest reports a skip."""


def check_variant(cfg: AdapterConfig, skip: Collection[str] = ()) -> dict[str, str]:
    """Run every check of the kit on a variant.

    Args:
        cfg: an instance of the variant's config. Its target fields are not used: the kit makes its own layers and data.
        skip: names of checks that do not apply.

    Returns:
        The checks that could not run here, by name, each with the reason: those on quantised layers without bitsandbytes.

    Raises:
        AssertionError: it lists each check that failed, with what was expected and found.
        ValueError: where `skip` names no check, or the config fits no layer.
    """
    unknown = [name for name in skip if name not in CHECKS]
    if unknown:
        raise ValueError(f"check_variant: expected skip to name checks among {list(CHECKS)}, found {unknown}.")
    cfg = as_config(cfg)
    make_cases(cfg, torch.float32)  # a config that fits no layer fails here, once
    failures: list[str] = []
    skipped: dict[str, str] = {}
    for name, check in CHECKS.items():
        if name in skip:
            continue
        with _recorded(name, failures, skipped):
            check(cfg)
    if failures:
        lines = "\n".join(f"  - {failure}" for failure in failures)
        raise AssertionError(f"{type(cfg).__name__} fails {len(failures)} of {len(CHECKS)} checks:\n{lines}")
    return skipped


@contextmanager
def _recorded(name: str, failures: list[str], skipped: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except unittest.SkipTest as e:
        skipped[name] = str(e)
    except Exception as e:
        failures.append(told(name, e))
