"""Products whose backward pass computes cheap intermediate tensors again instead of keeping them.

An update `D (o, i)` that is made of a few numbers costs little to make and as much memory as the weight to keep. Plain autograd would keep
it for each layer. The Functions here keep what it is made of.

They run where plain autograd records and the tensors are large enough. Elsewhere the function itself runs: `torch.func.grad` keeps the
graph of the gradient, and so all that it computes again, and a compiler chooses by itself what to keep.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from lora_lite.core.autocast import autocast_as, autocast_state
from lora_lite.core.tracing import in_transform

Compute = Callable[..., Tensor]
Vjp = Callable[..., tuple[Tensor, Callable[[Tensor], Sequence[Tensor | None]]]]

SMALL = 1 << 14
"""Number of entries up to which an intermediate tensor is kept: the price of a Function in Python is then the larger one."""


def recomputes(entries: int, tensors: Sequence[Tensor], fixed: Sequence[Tensor | None] = ()) -> bool:
    """Whether intermediate tensors of so many entries are to be computed again: `tensors` may have gradients, `fixed` must not."""
    if entries <= SMALL or not torch.is_grad_enabled() or in_transform() or forward_ad._current_level >= 0:
        return False
    needs = any(t.requires_grad for t in tensors)
    return needs and not any(t is not None and t.requires_grad for t in fixed)


def unviewed(tensor: Tensor, given: Sequence[Tensor]) -> Tensor:
    """Return a tensor that a Function may hand out, so that its receiver may change the values in place.

    Autograd allows that for no view that is made inside a Function. For a view of all of a tensor this is the tensor itself, of another
    shape: take the view outside. For other views it is a copy. A view of a given tensor stays one.
    """
    base = tensor._base
    if base is None or any(base is t or base is t._base for t in given):
        return tensor
    alike = base.numel() == tensor.numel() and base.dtype == tensor.dtype and base.is_conj() == tensor.is_conj()
    contiguous = base.is_contiguous() and tensor.is_contiguous() and base.is_neg() == tensor.is_neg()
    return base if alike and contiguous else tensor.clone()


def recomputed(f: Compute, *tensors: Tensor) -> Tensor:
    """Return `f(*tensors)`, of which the backward pass keeps `tensors` alone. `f` draws no random numbers."""
    if not recomputes(max(t.numel() for t in tensors), tensors):
        return f(*tensors)
    shape: list[int] = []
    return _Recomputed.apply(f, shape, *tensors).view(shape)


def linear_plus(
    x: Tensor,
    shape: tuple[int, int],
    update: Compute,
    tensors: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    vjp: Vjp | None = None,
) -> Tensor:
    """Return `x (weight + D)^T + bias` for `D = update(*tensors)`, of which the backward pass keeps all but `D`.

    Args:
        x: `(*b, i)`.
        shape: that of `D`, `(o, i)`.
        update: a function that draws no random numbers.
        tensors: its arguments.
        weight: `(o, i)`, or None for `x D^T`.
        bias: `(o,)`.
        vjp: a cheaper way to the sum, and to gradients that have none themselves. `vjp(weight, *tensors)` returns `weight + D`, and a
            function from its gradient, which that may overwrite, to those of the tensors. The function is called once at most.
    """
    if recomputes(shape[0] * shape[1], tensors, (weight, bias)):
        return _LinearPlus.apply(update, vjp, weight, bias, x, *tensors).view(*x.shape[:-1], shape[0])
    whole = _sum(weight, update(*tensors)) if vjp is None or torch.is_grad_enabled() else vjp(weight, *tensors)[0]
    return F.linear(x, whole, bias)


def gradients_of(f: Compute, tensors: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of `f(*tensors)`, None for a tensor that needs none. In a backward pass that makes a graph they have one."""
    inputs, out = _again(f, tensors)
    return _gradients(out, inputs, grad, needs)


class _Recomputed(torch.autograd.Function):
    """Return `f(*tensors)`, in another shape where it is a view. Its own is put into `shape`."""

    @staticmethod
    def forward(ctx: Any, f: Compute, shape: list[int], *tensors: Tensor) -> Tensor:
        state, y = autocast_state(), f(*tensors)
        out = unviewed(y, tensors)
        shape.extend(y.shape)

        def again(*tensors: Tensor) -> Tensor:
            with autocast_as(state):
                return f(*tensors).reshape(of_out)

        ctx.again, of_out = again, out.shape
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *gradients_of(ctx.again, ctx.saved_tensors, grad, ctx.needs_input_grad[2:])


class _LinearPlus(torch.autograd.Function):
    """Return `(tokens, o)`: of a view that is made in here, autograd allows nobody to change the values in place."""

    @staticmethod
    def forward(
        ctx: Any, update: Compute, vjp: Vjp | None, weight: Tensor | None, bias: Tensor | None, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.update, ctx.vjp = update, vjp
        ctx.save_for_backward(weight, x, *tensors)
        whole = _sum(weight, update(*tensors)) if vjp is None else vjp(weight, *tensors)[0]
        return F.linear(x.reshape(-1, x.shape[-1]), whole, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, *tensors = ctx.saved_tensors
        of_x, *of_tensors = ctx.needs_input_grad[4:]
        # A batch of gradients, of `is_grads_batched`, has no rule for writing in place.
        plain = ctx.vjp is None or torch.is_grad_enabled() or is_legacy_batchedtensor(grad)
        whole, pull = (_vjp(ctx.update, of_tensors) if plain else ctx.vjp)(weight, *tensors)
        grad_x = (grad @ whole).view(x.shape) if of_x else None
        del whole
        found = pull(grad.t() @ x.reshape(-1, x.shape[-1])) if any(of_tensors) else [None] * len(tensors)
        return None, None, None, None, grad_x, *found


def _vjp(update: Compute, needs: Sequence[bool]) -> Vjp:
    """Return the sum with `update` and its gradients by autograd, None for a tensor that needs none."""

    def vjp(weight: Tensor | None, *tensors: Tensor) -> Any:
        inputs, D = _again(update, tensors)
        return _sum(weight, D if torch.is_grad_enabled() else D.detach()), lambda grad: _gradients(D, inputs, grad, needs)

    return vjp


def _sum(weight: Tensor | None, D: Tensor) -> Tensor:
    return D if weight is None else weight + D


def _again(f: Compute, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
    """Return the inputs of `f` and its value with a graph; attached to the tensors' own where the gradient is to have one."""
    inputs = tensors if torch.is_grad_enabled() else [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    with torch.enable_grad():
        return inputs, f(*inputs)


def _gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    wanted = [t for t, need in zip(inputs, needs) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need else None for need in needs]
