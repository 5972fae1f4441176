"""The product with a square matrix of which a few entries are trained.

On a CPU it goes entry by entry, by the kernel of `embedding_bag`: a hundredth of the entries takes a twentieth of the dense product's time.
Elsewhere (in transforms, compiled, on a GPU) it is the product with a dense matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from lora_lite.core.autocast import autocasts
from lora_lite.core.recompute import gradients_of
from lora_lite.core.tracing import in_transform

FILLED = 8
"""Number of entries of the matrix for each trained one from which going entry by entry is the faster way, by measurement."""


def _flat(index: Tensor) -> Tensor:
    return index


def times_entries(h: Tensor, values: Tensor, index: Tensor, flat: Callable[[Tensor], Tensor] = _flat) -> Tensor:
    """Return `M h`, `(*b, k)`, for the `(k, k)` matrix that has `values (n,)` at `flat(index)` and zeros elsewhere.

    Args:
        h: `(*b, k)`; the faster way reads vectors as columns, see `as_columns`.
        values: `(n,)`.
        index: the constant of the layer that says where; what is derived of it is cached for as long as it lives.
        flat: a function of `index` to the places `a k + c`, `(n,)`, int64.
    """
    if goes_by_entry(h, values, index, h.shape[-1]):
        return _Entries.apply(h, values, _orders(index, flat, h.shape[-1]), lambda h, values: _dense(h, values, flat(index)))
    return _dense(h, values, flat(index))


def goes_by_entry(x: Tensor, values: Tensor, index: Tensor, k: int) -> bool:
    """Whether `times_entries` goes entry by entry for `values` of a `(k, k)` matrix and vectors of the dtype and the device of `x`."""
    if FILLED * values.shape[0] > k * k or not x.numel() or in_transform() or forward_ad._current_level >= 0 or autocasts(x):
        return False
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in (x, values, index)) and not index.is_inference()
    return plain and x.dtype == values.dtype and x.dtype in (torch.float32, torch.float64)


def as_columns(x: Tensor, V: Tensor) -> Tensor:
    """Return `x V^T`, `(*b, i)` and `(k, i)` to `(*b, k)`, in memory one vector a column, as `times_entries` has it."""
    flat = x.reshape(-1, x.shape[-1])
    return (V @ flat.t()).t().reshape(*x.shape[:-1], len(V))  # a view


class _Order(NamedTuple):
    """Entries sorted by the row of the matrix: which they are, their columns, and where each row starts."""

    order: Tensor
    columns: Tensor
    starts: Tensor


_ORDERS = WeakIdKeyDictionary()  # index -> (its version, the orders)


def _orders(index: Tensor, flat: Callable[[Tensor], Tensor], k: int) -> tuple[_Order, _Order]:
    """Return the entries in the order of the matrix and of its transpose, cached."""
    version, orders = _ORDERS.get(index, (None, None))
    if version != index._version or orders is None:
        places = flat(index)
        rows, columns = places // k, places % k
        orders = _order(rows, columns, k), _order(columns, rows, k)
        _ORDERS[index] = index._version, orders
    return orders


def _order(rows: Tensor, columns: Tensor, k: int) -> _Order:
    order = rows.argsort(stable=True)
    starts = torch.searchsorted(rows[order], torch.arange(k, dtype=rows.dtype))
    return _Order(order, columns[order], starts)


def _dense(h: Tensor, values: Tensor, places: Tensor) -> Tensor:
    k = h.shape[-1]
    return F.linear(h, values.new_zeros(k * k).index_add(0, places, values).view(k, k))


def _by_row(columns: Tensor, values: Tensor, order: _Order) -> Tensor:
    """Return `M h^T (k, b)` of `h^T`, as a sum over the entries of each row."""
    return F.embedding_bag(order.columns, columns, order.starts, mode="sum", per_sample_weights=values[order.order])


def _columns(h: Tensor) -> Tensor:
    return h.reshape(-1, h.shape[-1]).t().contiguous()  # no copy where the vectors are columns already


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, values: Tensor, orders: tuple[_Order, _Order], dense: Callable[..., Tensor]) -> Tensor:
        ctx.orders, ctx.dense = orders, dense
        ctx.save_for_backward(h, values)
        return _by_row(_columns(h), values, orders[0]).t().reshape(h.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, values = ctx.saved_tensors
        of_h, of_values, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or in_transform():
            return *gradients_of(ctx.dense, (h, values), grad, (of_h, of_values)), None, None
        columns = _columns(grad)
        grad_h = _by_row(columns, values, ctx.orders[1]).t().reshape(h.shape) if of_h else None
        return grad_h, _of_values(_columns(h), values, columns, ctx.orders[0]) if of_values else None, None, None


def _of_values(columns: Tensor, values: Tensor, grad: Tensor, order: _Order) -> Tensor:
    """Return the gradient of the values: for each entry the product of a row of the gradient with one of the input, nothing dense."""
    values = values.detach().requires_grad_()
    with torch.enable_grad():
        out = _by_row(columns, values, order)
    return torch.autograd.grad(out, values, grad)[0]
