"""The update that is the entrywise product of two low-rank matrices, in the cheaper of its two forms."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lite.core import Frozen

MADE = 16
"""Cost of the matrix form that no token pays for: that of so many tokens for each rank, by measurement."""


def plus_product(W: Frozen, x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Return `W(x) + scale [(B1 A1) * (B2 A2)] x` of two pairs `B (o, r)`, `A (r, i)`, in the form that is the cheaper one."""
    (B1, A1), (B2, A2) = first, second
    if by_matrix(len(A1) * len(A2), W, x):
        return W.updated_by(x, partial(_product, scale), B1, A1, B2, A2, vjp=partial(_vjp, scale))
    A = (A1[:, None] * A2).flatten(0, 1)  # (r1 r2, i)
    B = (B1[:, :, None] * B2[:, None]).flatten(1)  # (o, r1 r2)
    return W.updated_low_rank(x, (A, B), scale)


def by_matrix(r: int, W: Frozen, x: Tensor) -> bool:
    """Whether the matrix is to be multiplied out, rather than taken as factors of rank `r`.

    A training step takes three products for each token with the factors, and one with the matrix, for its gradient. A compiled function
    is for any number of tokens, and goes by the forward pass of many.
    """
    i, o = W.in_features, W.out_features
    if r * (i + o) >= i * o:
        return True
    if torch.compiler.is_compiling():
        return False
    tokens = W.vectors(x).shape[:-1].numel()
    return 3 * tokens * r * (i + o) >= (tokens + MADE * math.isqrt(r)) * i * o


def _product(scale: float, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    return (scale * B1 @ A1) * (B2 @ A2)


def _vjp(scale: float, weight: Tensor | None, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> tuple[Tensor, Any]:
    """Return the product on top of a weight, and the gradients of the factors: two matrices are made, and the gradient overwrites them."""
    B1 = scale * B1
    P, Q = B1 @ A1, B2 @ A2

    def pull(grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows1, rows2 = A1.t().contiguous(), A2.t().contiguous()  # products with these are the quicker ones
        of_Q, of_P = P.mul_(grad), grad.mul_(Q)
        return (of_P @ rows1).mul_(scale), B1.t() @ of_P, of_Q @ rows2, B2.t() @ of_Q

    return P * Q if weight is None else torch.addcmul(weight, P, Q), pull
