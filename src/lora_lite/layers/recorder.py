"""A recorder in the place of a whole module: it notes what a variant does to it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lora_lite.core.frozen import Frozen


class Recorder(Frozen):
    """A stand-in for a module that records a variant's displacements.

    What the variant does besides shows in its input, the module's unless it computed another, and in its result, the moved module's own.
    """

    def __init__(self, W: Any) -> None:
        super().__init__(W.weight, None, W.constants, W.training)
        self._W = W
        self.deltas: Mapping[str, Tensor] | None = None
        self.called = False
        self.given: Any = None
        self.result: Any = None

    def alone(self, x: Tensor, y: Any) -> bool:
        """Whether a variant that made `y` of `x` did no more than move parameters."""
        return self.deltas is not None and not self.called and self.given is x and self.result is y

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
        return self._moved

    def _moved(self, x: Tensor) -> Tensor:
        self.given, self.result = x, x.new_zeros(*x.shape[:-1], self.out_features)
        return self.result
