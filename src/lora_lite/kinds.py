"""The table of the kinds of linear layers, and the one place that maps a module to its kind."""

from collections.abc import Sequence

from torch import nn

from lora_lite.bnb import FrozenLinear4bit, FrozenLinear8bit
from lora_lite.frozen import FrozenConv1D, FrozenLinear

KINDS: tuple[type[FrozenLinear], ...] = (FrozenLinear4bit, FrozenLinear8bit, FrozenLinear, FrozenConv1D)
"""The kinds that ship, the first that fits a module being its kind; `build(..., kinds=)` puts a user's own before them."""


def kind_of(layer: nn.Module, kinds: Sequence[type[FrozenLinear]] = ()) -> type[FrozenLinear] | None:
    """Find the kind of a module, or None where it is not linear-like."""
    return next((kind for kind in (*kinds, *KINDS) if kind.fits(layer)), None)


def own_forward(layer: nn.Module, kind: type[FrozenLinear]) -> bool:
    """Tell whether a module computes something else than its kind does."""
    return "forward" in vars(layer) or not kind.faithful(layer)
