"""A recorder in the place of a whole module: it notes what a variant does to it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lora_lite.core.frozen import Frozen


class Recorder(Frozen):
    """A stand-in for a module that records a variant's displacements, and whether the variant called the module besides."""

    def __init__(self, W: Any) -> None:
        super().__init__(W.weight, None, W.constants, W.training)
        self._W = W
        self.deltas: Mapping[str, Tensor] | None = None
        self.called = False

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._W.parameters

    @property
    def in_features(self) -> int:
        return self._W.in_features

    @property
    def out_features(self) -> int:
        return self._W.out_features

    def __call__(self, x: Tensor) -> Tensor:
        self.called = True
        return x

    def moved(self, deltas: Mapping[str, Tensor]) -> Callable[[Any], Any]:
        self.deltas = dict(deltas)
        return lambda x: x
