"""Subclasses of torch's layers with a forward of their own: routers of mixtures, projections in groups, causal convolutions.

The forward stays, and whatever it does with the weight is done with the adapted one. The product `F.linear(x, weight, bias)` of a linear
layer, which `super().forward(x)` is, reaches the variant as a call of a linear layer does, so that inputs are dropped there and each row
of a mixed batch has its own params. Any other use of the weight reads the variant's function at the identity.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_lite.layers.access import first_of
from lora_lite.layers.convolution import GroupedConvKind
from lora_lite.layers.embedding import EmbeddingKind
from lora_lite.layers.kind import Kind
from lora_lite.layers.linear import LinearKind
from lora_lite.layers.transposed import TransposedConvKind


class OwnForwardKind(LinearKind):
    """An `nn.Linear` whose class has another forward, such as `Llama4Router`."""

    gives: ClassVar[AbstractSet[str]] = Kind.gives - {"inputs"}
    why: ClassVar[str] = (
        "Its class has a forward of its own, and calibration sees the inputs of that, which need not be those of its product."
    )
    keeps_forward: ClassVar[bool] = True
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


class _Read(Kind):
    """A layer whose own forward reads its weight, as the module around a bare parameter does."""

    why: ClassVar[str] = (
        "Its class has a forward of its own, which reads the weight: all rows see the same one, and there is no input to drop or to "
        "calibrate on."
    )
    keeps_forward: ClassVar[bool] = True
    sees_inputs: ClassVar[bool] = False
    takes_shifts: ClassVar[bool] = False

    def sharer(self, module: nn.Module) -> Kind | None:
        return None

    def bind(self, layer: nn.Module, binding: Any) -> None:
        """Leave the layer's own forward: it reads the weight."""


class _ReadKernel(_Read):
    """A convolution that the kind beside this one in the bases would compute otherwise than its class does."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer)) and not super().faithful(layer)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return True


class OwnForwardConvKind(_ReadKernel, GroupedConvKind):
    """A convolution whose class has another forward: causal ones, and those that standardise their kernel."""


class OwnForwardTransposedKind(_ReadKernel, TransposedConvKind):
    """The same of a transposed convolution."""


class OwnForwardEmbeddingKind(_Read, EmbeddingKind):
    """An embedding whose class has another forward: positions that are counted from an offset."""

    gives: ClassVar[AbstractSet[str]] = EmbeddingKind.gives - {"dropout"}
    facts: ClassVar[tuple[str, ...]] = ("padding_idx", "scale_grad_by_freq")

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return super().fits(layer) and not cls.known(layer)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return layer.max_norm is None
