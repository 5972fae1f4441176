"""`W x + b + scale B A x`, and the same of a product that does not start at zero, in few passes and with little kept for the gradient.

Plain autograd makes two tensors of the output's size, where the product can be added to the layer's own output in place, and three of the
input's size for its gradient. Of a product that starts at `B0 A0` it would keep both pairs of factors, and compute the gradients of the
fixed ones: `B A - B0 A0` with `A = A0 + dA`, `B = B0 + dB` is `B0 dA + dB A`, in which nothing cancels, a product of twice the rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from lora_lite.core.linalg import add_low_rank
from lora_lite.core.recompute import gradients_of, recomputes

FEW = 32
"""Tokens up to which both pairs of factors are multiplied one by one: to put them side by side takes longer than their products."""


class Factors(NamedTuple):
    """`B A` with `A (r, i)`, `B (o, r)`; or `B diag(S) A` with `S (r,)`."""

    A: Tensor
    B: Tensor
    S: Tensor | None = None


def both_of(factors: Sequence[Tensor], start: Sequence[Tensor] | None) -> tuple[Factors, Factors | None]:
    """Return factors and their start as such; a diagonal without a start is multiplied into the factor before it.

    Raises:
        ValueError: where only one of the two has a diagonal.
    """
    given = Factors(*factors)
    if start is None:
        return (given if given.S is None else Factors(given.S.unsqueeze(-1) * given.A, given.B)), None
    begun = Factors(*start)
    if (given.S is None) != (begun.S is None):
        has, lacks = ("factors", "start") if begun.S is None else ("start", "factors")
        raise ValueError(f"updated_low_rank: expected (A, B, S) in factors and in start, found S in {has} alone. Give {lacks} one too.")
    return given, begun


class _Fixed(NamedTuple):
    """All that is not trained: the layer, unless its output is given, where the product starts, and the factor of the update."""

    weight: Tensor | None
    bias: Tensor | None
    start: Factors | None
    scale: float


def low_rank_plus(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scale: float, start: Factors | None = None) -> Tensor:
    """Return `x (weight + scale U)^T + bias` with the update `U` of `added`, in the dtype that all have; `weight` and `bias` are fixed."""
    # Without these gradients plain autograd keeps less: no input for that of A, no A for that of the input.
    wanted = start is not None or (x.requires_grad and factors.A.requires_grad)
    if wanted and recomputes(x.numel(), _tensors(x, *factors), (weight, bias, *(start or ()))):
        y = _LowRank.apply(x.reshape(-1, x.shape[-1]), None, *factors, _Fixed(weight, bias, start, scale))
        return y.view(*x.shape[:-1], weight.shape[0])
    return _added(F.linear(x, weight, bias), x, factors, start, scale)


def added(y0: Tensor, x: Tensor, factors: Factors, scale: float, start: Factors) -> Tensor:
    """Return `y0 + scale U x` with `U = (B0 + B) (A0 + A) - B0 A0`: the factors have moved from a start.

    With diagonals `U` is `(B0 + B) diag(S0 + S) (A0 + A) - B0 diag(S0) A0`. Of what it computes the backward pass keeps `(A0 + A) x` alone.
    """
    alike = x.dtype == y0.dtype == factors.A.dtype == start.A.dtype  # under autocast they are not
    if alike and recomputes(x.numel(), _tensors(y0, x, *factors), start):
        flat = x.reshape(-1, x.shape[-1]), y0.reshape(-1, y0.shape[-1])
        return _LowRank.apply(*flat, *factors, _Fixed(None, None, start, scale)).view(y0.shape)
    return _added(y0, x, factors, start, scale)


def _tensors(*given: Tensor | None) -> list[Tensor]:
    return [t for t in given if t is not None]


def _added(y0: Tensor, x: Tensor, factors: Factors, start: Factors | None, scale: float) -> Tensor:
    if start is not None and not torch.compiler.is_compiling() and x.numel() <= FEW * x.shape[-1]:
        flat, y = x.reshape(-1, x.shape[-1]), y0.reshape(-1, y0.shape[-1])
        moved = F.linear(flat, factors.A)
        first, second = _parts(moved, moved + F.linear(flat, start.A), factors.S, start)
        return add_low_rank(add_low_rank(y, first, start.B, scale), second, factors.B, scale).view(y0.shape)
    h = F.linear(x, _right(factors.A, start and start.A))
    return add_low_rank(y0, _between(h, factors.S, start)[0], _left(factors.B, start and start.B), scale)


def _right(A: Tensor, A0: Tensor | None) -> Tensor:
    return A if A0 is None else torch.cat((A, A0))


def _left(B: Tensor, B0: Tensor | None) -> Tensor:
    return B if B0 is None else torch.cat((B0, B), 1)


def _between(h: Tensor, S: Tensor | None, start: Factors | None) -> tuple[Tensor, Tensor]:
    """Return the input of the left factors, from the output of the right ones, and `(A0 + A) x`."""
    if start is None:
        return h, h
    moved, fixed = h.tensor_split(2, -1)
    both = moved + fixed
    return torch.cat(_parts(moved, both, S, start), -1), both


def _parts(moved: Tensor, both: Tensor, S: Tensor | None, start: Factors) -> tuple[Tensor, Tensor]:
    """Return the inputs of `B0` and of `B`, from `A x` and `(A0 + A) x`."""
    return (moved, both) if S is None or start.S is None else (S * both + start.S * moved, (start.S + S) * both)


class _LowRank(torch.autograd.Function):
    """The sum for inputs `(tokens, i)`, added to outputs `y0 (tokens, o)` or, without these, to the layer's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y0: Tensor | None, A: Tensor, B: Tensor, S: Tensor | None, fixed: _Fixed) -> Tensor:
        weight, bias, start, ctx.scale = fixed
        h, both = _between(F.linear(x, _right(A, start and start.A)), S, start)
        kept = both if any(ctx.needs_input_grad[3:5]) else None
        ctx.save_for_backward(x, kept, A, B, S, weight, *(start or ()))
        left = _left(B, start and start.B).t()
        if y0 is None:
            return F.linear(x, weight, bias).addmm_(h, left, alpha=ctx.scale)  # type: ignore[arg-type]  # the layer is there
        return torch.addmm(y0, h, left, alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, both, A, B, S, weight, *begun = ctx.saved_tensors
        factors, start = Factors(A, B, S), Factors(*begun) if begun else None
        x_needs, y0_needs, *needs, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_legacy_batchedtensor(grad):
            found = _again(grad, x, weight, factors, start, ctx.scale, (x_needs, *needs))
        else:
            found = _gradients(grad, x, both, weight, factors, start, ctx.scale, (x_needs, *needs))
        of_x, *of_factors = found
        return of_x, grad if y0_needs else None, *of_factors, None


def _again(
    grad: Tensor, x: Tensor, weight: Tensor | None, factors: Factors, start: Factors | None, scale: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of `x, A, B, S` by plain autograd, None for one that is not needed."""
    given = _tensors(x, *factors)
    zeros = x.new_zeros(len(x), len(factors.B))

    def plain(x: Tensor, *factors: Tensor) -> Tensor:
        return _added(zeros if weight is None else F.linear(x, weight), x, Factors(*factors), start, scale)

    return [*gradients_of(plain, given, grad, needs[: len(given)]), None][:4]


def _gradients(
    grad: Tensor,
    x: Tensor,
    both: Tensor | None,
    weight: Tensor | None,
    factors: Factors,
    start: Factors | None,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the same gradients as `_again`, in fewer passes."""
    (A, B, S), of_S, second = factors, None, both
    of_h = of_right = (grad @ _left(B, start and start.B)).mul_(scale)
    if start is not None:
        of_moved, of_both = of_h.tensor_split(2, -1)
        if S is not None and start.S is not None:
            if both is not None:
                of_S, second = ((of_moved + of_both) * both).sum(0), (start.S + S) * both
            of_moved, of_both = start.S * of_moved, S * of_moved + (start.S + S) * of_both
        of_h = of_moved + of_both
        of_right = torch.cat((of_h, of_both), -1)
    of_A = of_h.t() @ x if needs[1] else None
    of_B = grad.t() @ (second * scale) if needs[2] and second is not None else None
    if not needs[0]:
        return [None, of_A, of_B, of_S]
    right = _right(A, start and start.A)
    of_x = of_right @ right if weight is None else (grad @ weight).addmm_(of_right, right)
    return [of_x, of_A, of_B, of_S]
