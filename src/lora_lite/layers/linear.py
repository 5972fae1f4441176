"""Linear layers: `nn.Linear`, transformers' `Conv1D` and Falcon's."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_lite.core.frozen import plus
from lora_lite.layers.kind import Kind


class LinearKind(Kind):
    """`nn.Linear`: reads the layer at each call, so that tensors bound for one call are seen."""

    classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    sums: ClassVar[bool] = True

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer)) and not holds_codes(layer)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return type(layer).forward is nn.Linear.forward

    def sharer(self, module: nn.Module) -> Kind | None:
        from lora_lite.layers.embedding import of_rows_in  # which reads heads as this

        return of_rows_in(module, self.constants)

    def __call__(self, x: Tensor) -> Tensor:
        table = self.layer._parameters
        try:  # looking the attributes up would be slow
            weight, bias = table["weight"], table["bias"]
        except KeyError:  # a parametrization
            weight, bias = self.weight, self.bias
        return linear(x, weight, bias)


def holds_codes(layer: nn.Module) -> bool:
    """Whether the weight is one of codes, as in a packed layer of a library that no kind reads: its bytes alone are not the map."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dtype.itemsize == 1


def keeps_codes(*tables: Mapping[str, Tensor | None]) -> bool:
    """Whether a module keeps codes in its parameters or buffers: tensors of two axes or more, of integers or of floats of a byte."""
    kept = [t for table in tables for t in table.values() if t is not None and t.dim() > 1 and t.dtype != torch.bool]
    return any(t.dtype.itemsize == 1 or (t.dtype.itemsize < 8 and not t.is_floating_point()) for t in kept)  # int64 are indices


class _OfTransformers(Kind):
    """A linear layer of transformers', recognised by the name of its class: an import would make transformers a dependency."""

    told_by: ClassVar[str]

    @classmethod
    def may_fit(cls, of: type[nn.Module]) -> bool:
        return any(c.__name__ == cls.told_by and c.__module__.startswith("transformers.") for c in of.__mro__)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return next(c for c in type(layer).__mro__ if "forward" in vars(c)).__name__ == cls.told_by


class FalconKind(_OfTransformers):
    """transformers' `FalconLinear`: an `nn.Linear` whose bias is added after the product has been rounded."""

    told_by = "FalconLinear"

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self.matmul(x), self.bias)


class Conv1DKind(_OfTransformers):
    """transformers' `Conv1D`, which stores `(i, o)`."""

    told_by = "Conv1D"

    @property
    def weight(self) -> Tensor:
        return self.own("weight").t()  # type: ignore[union-attr]

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer  # whose weight may be computed by a parametrization
        flat = torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight)  # as the layer itself computes it
        return flat.view(*x.shape[:-1], flat.shape[-1])  # -1 tells nothing of an empty batch

    def to_weight(self, dense: Tensor) -> Tensor:
        return dense.t()

    def original(self, weights: Mapping[str, Tensor], path: str) -> tuple[str, Tensor | None]:
        name, weight = super().original(weights, path)
        return name, None if weight is None else weight.t()
