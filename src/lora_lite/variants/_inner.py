"""An update `U M V` with frozen `U (o, k)` and `V (k, i)`, of which the inner map `M (k, k)` is trained."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.functional import linear

from lora_lite.core import Frozen, add_low_rank
from lora_lite.variants._entries import as_columns

FEW = 16
"""Number of input vectors up to which each passes through the factors, however narrow the layer."""


def plus_inner(
    W: Frozen,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    inner: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    cost: int,
    dropout: float = 0.0,
    columns: bool = False,
) -> Tensor:
    """Return `W x + b + U M V drop(x)` in the form whose step takes fewer multiply-adds, `(*b, i) -> (*b, o)`.

    Where the update is multiplied out, the backward pass makes it again if that is cheaper than one product with it.

    Args:
        W: the layer.
        x: `(*b, i)`.
        U: `(o, k)`, frozen.
        V: `(k, i)`, frozen.
        inner: `(h, *tensors)` to `M h` for each vector of `h (*b, k)`.
        tensors: the trained numbers of `M`.
        cost: multiply-adds of `M h`.
        dropout: of the input of the update.
        columns: whether `inner` is faster on vectors that are columns in memory.
    """
    (o, k), i = U.shape, V.shape[1]
    tokens, making = x.numel() // i, i * (cost + o * k)

    def update(*tensors: Tensor) -> Tensor:
        return U @ inner(V.t(), *tensors).t()

    # Forward and backward: each of the factors twice and M three times, or W + U M V once more than W, made and differentiated.
    if tokens > FEW and tokens * (2 * k * (i + o) + 3 * cost) > tokens * i * o + 2 * making:
        if making <= tokens * i * o:
            return W.updated_by(x, update, *tensors, dropout=dropout)
        return W.updated(x, update(*tensors), dropout)
    project = as_columns if columns else linear
    return add_low_rank(W(x), inner(project(W.dropped(x, dropout), V), *tensors), U)
