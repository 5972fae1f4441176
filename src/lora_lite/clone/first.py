"""The first call of a target, whose result is looked at. Later ones go straight to the formula."""

from typing import Any

from torch import Tensor

from lora_lite.clone.listing import parameters_of
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen
from lora_lite.core.written import written
from lora_lite.layers.kind import Kind


class First:
    """The first call of a target, which may read the layer and its input, and returns outputs of the layer's widths.

    Args:
        path: the target's path.
        cfg: its variant.
        W: its layer.
        x: the input of the call.
    """

    def __init__(self, path: str, cfg: AdapterConfig, W: Kind, x: Any) -> None:
        self._where, self._W, self._x = f'{type(cfg).__name__}.forward at "{path}"', W, x
        given = {"x": x} if isinstance(x, Tensor) and W.sums else {}  # a layer with a forward of its own may write to its input
        self._written = written({**parameters_of(W.layer), **given})
        self._vectors = cfg.adapts == "linear" and isinstance(x, Tensor) and type(W).vectors is Frozen.vectors

    def require(self, y: Any) -> None:
        """Raise unless the call did no more than that.

        Raises:
            TypeError: where the formula returned no tensor.
            ValueError: where its output has another shape than the layer's own.
            RuntimeError: where it wrote to its input or to the layer's weights, which are the user's.
        """
        if names := self._written():
            raise RuntimeError(
                f"{self._where}: expected a formula that writes nothing in place, found that it wrote to {names}. Weights are the user's: "
                "load them again. Compute with new tensors, e.g. W.weight + D instead of W.weight.add_(D)."
            )
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{self._where}: expected a tensor, the layer's output (*b, o), found {type(y).__name__}. Return W(x) + update."
            )
        if self._vectors and self._x.shape[-1:] == (self._W.in_features,):
            wanted = (*self._x.shape[:-1], self._W.out_features)
            if y.shape != wanted:
                raise ValueError(
                    f"{self._where}: expected an output of shape {tuple(wanted)} for an input of shape {tuple(self._x.shape)}, found "
                    f"{tuple(y.shape)}. Return W(x) + update, an update (*b, o)."
                )
