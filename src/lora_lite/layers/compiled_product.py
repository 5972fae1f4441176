"""The product with a packed weight inside `torch.compile`.

The dense weight depends on no gradient. So the compiler would make it in the forward pass and keep it for the backward pass, in the end for
all layers at once. Inside torch's checkpoint the compiler recomputes it, but derivatives of torch.func cannot enter a checkpoint. There a
Function dequantises again, which the compiler traces under a single level of reverse mode. Where transforms are nested, as in the gradient
of a mixed batch, the dense weights are kept.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import TransformType, retrieve_current_functorch_interpreter
from torch.utils.checkpoint import checkpoint

Dequantise = Callable[[torch.dtype], Tensor]


def traced_product(dequantise: Dequantise, x: Tensor) -> Tensor:
    """Return `x W^T` in the dtype of `x`: `(*b, i) -> (*b, o)`."""
    if torch._C._are_functorch_transforms_active():
        innermost = retrieve_current_functorch_interpreter()
        if innermost.level() > 1 or innermost.key() == TransformType.Jvp:
            return _product(dequantise, x)
        if innermost.key() == TransformType.Grad:
            return _DequantisedTwice.apply(dequantise, x)
    return checkpoint(_product, dequantise, x, use_reentrant=False)


def _product(dequantise: Dequantise, x: Tensor) -> Tensor:
    return F.linear(x, dequantise(x.dtype))


class _DequantisedTwice(torch.autograd.Function):
    """`x -> x W^T`, with a dense weight of its own for each pass. It has no jvp, since the compiler refuses a Function with one."""

    @staticmethod
    def forward(dequantise: Dequantise, x: Tensor) -> Tensor:
        return _product(dequantise, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dequantise = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad @ ctx.dequantise(grad.dtype)
