"""Subclasses of torch's layers with a forward of their own: routers of mixtures, projections in groups, causal convolutions.

The forward stays, and whatever it does with the weight is done with the adapted one. The product `F.linear(x, weight, bias)` of a linear
layer, which `super().forward(x)` is, reaches the variant as a call of a linear layer does, so that inputs are dropped there and each row
of a mixed batch has its own params. Any other use of the weight reads the variant's function at the identity.

An autograd Function, as layers that round their weight in training have it, takes a stand-in for the frozen parameter: no gradient would
reach the adapter. A forward that gives one its weight runs again, with the adapted tensor itself in the place of the stand-in.
"""

import functools
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.core.tracing import uncompiled
from lora_lite.layers.access import HOST, first_of
from lora_lite.layers.convolution import GroupedConvKind
from lora_lite.layers.embedding import EmbeddingKind
from lora_lite.layers.given import GivenToFunction
from lora_lite.layers.kind import Kind
from lora_lite.layers.linear import LinearKind
from lora_lite.layers.transposed import TransposedConvKind


class _Kept(Kind):
    """A layer that keeps its own forward."""

    keeps_forward: ClassVar[bool] = True
    whole: bool | None = None
    """Whether the forward finds the adapted weight itself, not a stand-in; None where it has not run yet."""

    def bind(self, layer: nn.Module, binding: Any) -> None:
        vars(layer)["forward"] = functools.partial(_followed, binding)

    def sharer(self, module: nn.Module) -> Kind | None:
        return None


def _followed(binding: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer's own forward, and again with the adapted weight itself where it gives the stand-in to an autograd Function."""
    W, traced = binding.W, torch.compiler.is_compiling()
    if binding.off or (traced and not W.whole):
        return binding.own(*args, **kwargs)
    if not W.whole:
        W.tries = True
        try:
            with uncompiled(W.whole is None):  # nothing tells what a Function is given that runs compiled
                y = binding.own(*args, **kwargs)
            W.whole = False
            return y
        except GivenToFunction as e:
            if e.binding is not binding:
                raise
            W.whole = True
        finally:
            W.tries = False
    own = vars(vars(W.layer)[HOST])
    kept = {name: own[name] for name in W.readable()}
    try:
        own.update({name: binding.read(name) for name in kept})
        return binding.own(*args, **kwargs)
    finally:
        own.update(kept)


class OwnForwardKind(_Kept, LinearKind):
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

    def frozen(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return self(first_of(args, kwargs))


class _Read(_Kept):
    """A layer whose own forward reads its weight, as the module around a bare parameter does."""

    why: ClassVar[str] = (
        "Its class has a forward of its own, which reads the weight: all rows see the same one, and there is no input to drop or to "
        "calibrate on."
    )
    sees_inputs: ClassVar[bool] = False
    takes_shifts: ClassVar[bool] = False


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
