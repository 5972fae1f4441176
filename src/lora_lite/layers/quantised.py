"""Kinds of layers whose weight is stored packed: the base class, and how such a layer runs in a clone.

A kind says how to dequantise; the products are derived, differentiable under every torch.func transform. The dense weight lives for one
product: nothing of it is kept for the backward pass, which dequantises again.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.layers.access import ADOPTED, raw
from lora_lite.layers.compiled_product import traced_product
from lora_lite.layers.kind import Kind


class _Product(torch.autograd.Function):
    """The product `x W^T`, or `x W` with `transposed`. Each is the derivative of the other, and so nothing is saved."""

    @staticmethod
    def forward(W: "FrozenQuantised", x: Tensor, transposed: bool) -> Tensor:
        return W.transpose_product(x) if transposed else W.product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.W, _, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _Product.apply(ctx.W, grad, not ctx.transposed), None

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        return _Product.apply(ctx.W, tangent, ctx.transposed)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], W: "FrozenQuantised", x: Tensor, transposed: bool) -> tuple[Tensor, int]:
        return _Product.apply(W, x.movedim(in_dims[1], 0), transposed), 0  # type: ignore[arg-type]


class FrozenQuantised(Kind):
    """Base of the kinds whose weight is stored packed. Write a subclass for a backend of your own.

    A subclass has `fits` and `dequantise`. `product` and `transpose_product` are derived from it and may be overridden by fused
    kernels, which need no derivative. `build`, `load` and `find_targets` take the class as `kinds=(MyKind,)`. In a clone, every layer
    that the kind fits runs the kind, target or not, so that the layer's own forward need not work under torch.func.

    Example:
        >>> import torch, lora_lite as ll
        >>> class Ternary(torch.nn.Module):
        ...     def __init__(self, o, i):
        ...         super().__init__()
        ...         self.in_features, self.out_features, self.bias = i, o, None
        ...         self.register_buffer("q", torch.randint(-1, 2, (o, i), dtype=torch.int8))
        ...
        ...     def forward(self, x):
        ...         return x @ self.q.to(x.dtype).t()
        >>> class FrozenTernary(ll.FrozenQuantised):
        ...     @classmethod
        ...     def fits(cls, layer):
        ...         return isinstance(layer, Ternary)
        ...
        ...     def dequantise(self, dtype):
        ...         return self.layer.q.to(dtype)
        >>> ll.build(torch.nn.Sequential(Ternary(4, 8)), ll.PiSSAConfig(r=2), kinds=(FrozenTernary,))
        Adapt(Sequential, pissa, 1 targets, 24 params)
    """

    @classmethod
    def isolate(cls, layer: Any) -> None:
        """Copy the bookkeeping that the backend rewrites in place, for a layer of a private copy. Weights stay shared."""

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a new dense `(o, i)` matrix in a floating `dtype`, by operations that `torch.compile` can trace."""
        raise NotImplementedError(f"{type(self).__name__}.dequantise(dtype) -> (o, i) is not defined")

    def product(self, x: Tensor) -> Tensor:
        """Return `x W^T` in the dtype of `x`: `(*b, i) -> (*b, o)`."""
        return F.linear(x, self._dequantised(x.dtype))

    def transpose_product(self, y: Tensor) -> Tensor:
        """Return `y W` in the dtype of `y`: `(*b, o) -> (*b, i)`."""
        return y @ self._dequantised(y.dtype)

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        found, shape = self.dequantise(dtype), (self.out_features, self.in_features)
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(
                f"{type(self).__name__}.dequantise({dtype}): expected the weight (o, i) of shape {shape} in that dtype, found shape "
                f"{tuple(found.shape)} in {found.dtype}. Return it so, e.g. by .to(dtype)."
            )
        return found

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which an input of `dtype` is multiplied. The output is cast back to the input's."""
        return dtype

    @property
    def weight(self) -> Tensor:
        return self.dense()

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.layer, "bias", None)

    @property
    def dtype(self) -> torch.dtype:
        """Float32, the dtype of `dense()`, whatever the layer's was before it was quantised."""
        return torch.float32

    @property
    def in_features(self) -> int:
        """Width of the input, `i`."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the output, `o`."""
        return self.layer.out_features

    @property
    def device(self) -> torch.device:
        """The device of the packed weight."""
        tables = [table for part in self.layer.modules() for table in (part._parameters, part._buffers)]
        devices = [t.device for table in tables for t in dict.values(table) if t is not None]  # a list may ask for the device itself
        return next((d for d in devices if d.type != "meta"), torch.device("meta"))  # placeholders of params lie on meta

    def __call__(self, x: Tensor) -> Tensor:
        return self._affine(x, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        return self._affine(x, None)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantised weight `(o, i)`, by default in float32."""
        return self._dequantised(dtype or self.dtype)

    def _affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # the layer has a compute dtype of its own, which autocast does not know
            with torch.autocast(x.device.type, enabled=False):
                return self._affine(x, bias)
        dtype = self.compute_dtype(x.dtype)
        y = self._product(x.to(dtype))
        return (y if bias is None else y + bias.to(dtype)).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler cannot trace a Function with a jvp
            return traced_product(self.dequantise, x)
        return _Product.apply(self, x, False)

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        """Make a layer of a copy run its kind, with the packed weights it has now, whatever becomes of the user's layer."""
        cls.isolate(layer)
        if not cls.faithful(layer):
            return
        vars(layer)[ADOPTED] = True
        vars(layer)["forward"] = functools.partial(_forward, cls(raw(layer)))
        vars(layer)["_apply"] = functools.partial(_apply, layer, cls)

    def kept(self) -> dict[str, Tensor]:
        bias = self.bias
        return {self.state["weight"]: self.to_weight(self.dense()), **({} if bias is None else {self.state["bias"]: bias})}

    def readable(self) -> list[str]:
        return []  # no model reads a packed weight


def _forward(W: FrozenQuantised, x: Tensor) -> Tensor:
    return W(x)


def _apply(layer: Any, kind: type[FrozenQuantised], fn: Any, recurse: bool = True) -> Any:
    """Move a layer as `to` and its like do, and read its weights again from where they have moved."""
    type(layer)._apply(layer, fn, recurse)
    forward = vars(layer).get("forward")
    kind.adopt(layer)
    binding: Any = getattr(forward, "__self__", None)
    if hasattr(binding, "reread"):
        binding.reread()
        vars(layer)["forward"] = forward
    return layer
