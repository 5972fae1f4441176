"""Subclasses of `nn.Linear` with a forward of their own: routers of mixtures, heads that scale their logits, projections in groups.

The forward stays, and whatever it does with the weight is done with the adapted one. Its product `F.linear(x, weight, bias)`, which
`super().forward(x)` is, reaches the variant as a call of a linear layer does, so that inputs are dropped there and each row of a mixed
batch has its own params. Any other use of the weight reads the variant's function at the identity.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_lite.layers.access import first_of
from lora_lite.layers.kind import Kind
from lora_lite.layers.linear import LinearKind


class OwnForwardKind(LinearKind):
    """An `nn.Linear` whose class has another forward, such as `Llama4Router`."""

    gives: ClassVar[AbstractSet[str]] = Kind.gives - {"inputs"}
    why: ClassVar[str] = (
        "Its class has a forward of its own, and calibration sees the inputs of that, which need not be those of its product."
    )
    by_product: ClassVar[bool] = True

    @classmethod
    def may_fit(cls, of: type[nn.Module]) -> bool:
        return super().may_fit(of) and of.forward is not nn.Linear.forward

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer))

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        """Whether the weight is one of numbers: packed in 8 bits it means what its class makes of it."""
        weight: Any = layer.weight
        return weight.is_floating_point() and weight.dtype.itemsize > 1

    def sharer(self, module: nn.Module) -> Kind | None:
        return None

    def bind(self, layer: nn.Module, binding: Any) -> None:
        """Leave the layer's own forward."""

    def frozen(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return self(first_of(args, kwargs))
