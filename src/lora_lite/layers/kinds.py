"""The table of the kinds of linear layers, and the one place that maps a module to its kind."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_lite.clone.accelerate import moves_inputs, runs_class_forward
from lora_lite.core.frozen import FrozenConv1D, FrozenFalconLinear, FrozenLinear
from lora_lite.layers.bitsandbytes import FrozenLinear4bit, FrozenLinear8bit

KINDS: tuple[type[FrozenLinear], ...] = (FrozenLinear4bit, FrozenLinear8bit, FrozenFalconLinear, FrozenLinear, FrozenConv1D)
"""The kinds that ship, the first that fits a module being its kind; `build(..., kinds=)` puts a user's own before them."""


def as_kinds(kinds: Any) -> tuple[type[FrozenLinear], ...]:
    """Check the kinds that a user gives.

    Raises:
        TypeError: where they are no sequence of kinds.
    """
    listed = kinds if isinstance(kinds, Sequence) and not isinstance(kinds, str) else None
    if listed is None or not all(isinstance(kind, type) and issubclass(kind, FrozenLinear) for kind in listed):
        raise TypeError(f"kinds: expected a sequence of subclasses of FrozenQuantised, found {kinds!r}. Write kinds=(ItsKind,).")
    return tuple(listed)


def kind_of(layer: nn.Module, kinds: Sequence[type[FrozenLinear]] = ()) -> type[FrozenLinear] | None:
    """Find the kind of a module, or None where it is not linear-like."""
    return next((kind for kind in (*kinds, *KINDS) if kind.fits(layer)), None)


def own_forward(layer: nn.Module, kind: type[FrozenLinear]) -> bool:
    """Tell whether a module computes something else than its kind does."""
    return not (runs_class_forward(layer) or moves_inputs(layer)) or not kind.faithful(layer)
