"""Linear layers whose weight is a tensor of a class of its own that dequantises: torchao's, optimum-quanto's, and others of that make."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.layers.packed import PackedKind
from lora_lite.layers.quantised import FrozenQuantised


class TensorClassKind(FrozenQuantised):
    """An `nn.Linear` whose weight has a `dequantize()` of its class: torchao's integers, FP8, NF4 and NVFP4 alike.

    Where the layer's own forward quantises the inputs too, the adapted model leaves that out: it is no linear map and has no derivative.
    """

    classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer)) and _dequantises(layer._parameters.get("weight"))

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return type(layer).forward is nn.Linear.forward

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return _dequantised(self.layer._parameters["weight"].detach()).to(dtype)


class QuantoKind(PackedKind, TensorClassKind):
    """optimum-quanto's `QLinear`, once it is frozen."""

    library, told_by = "optimum.quanto", frozenset({"QLinear"})

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return True  # `fits` tells it by its forward

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        if layer.activation_qtype is not None:
            return "quantises its activations, which then have no derivative: quantize(model, weights=...) without activations"
        if layer.weight_qtype is not None and not _dequantises(layer.weight):
            return "is not quantised yet: freeze(model), which does it"
        return None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        weight = self.layer._parameters["weight"].detach()
        return (_dequantised(weight) if _dequantises(weight) else weight).to(dtype)


_METHODS = ("get_original_weight", "dequantize")  # torchao's NF4Tensor has both, and its `dequantize` looks codes up in a table


def _dequantises(weight: Any) -> bool:
    return isinstance(weight, Tensor) and bool(_own(weight))


def _dequantised(weight: Any) -> Tensor:
    dense: Tensor = getattr(weight, _own(weight)[0])()
    return dense


def _own(weight: Tensor) -> list[str]:
    """List the methods by which a weight of a class of its own is dequantised: none where it has torch's own alone."""
    return [name for name in _METHODS if getattr(type(weight), name, None) not in (None, Tensor.dequantize)]
