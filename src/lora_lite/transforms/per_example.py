"""Per-example gradients and their norms: a mixed batch in which every row is a member of its own."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.adapt import Adapt
from lora_lite.core.errors import require_type
from lora_lite.core.tree import AnyTree, Tree, tree_leaves, tree_map
from lora_lite.derived.rows import RowMap
from lora_lite.transforms.gradients import differentiated_around, value_and_grad

LossRows = Callable[[Any, Any], Tensor]


def per_example_grad(
    adapt: Adapt, loss_rows: LossRows, chunk_size: int | None = None, row_map: Callable[[Any], RowMap] | None = None
) -> Callable[[AnyTree, Any], Tree]:
    """Make `(params, batch) -> per-example gradients`, in one forward and one backward pass of a mixed batch.

    Args:
        adapt: the adapted model. Rows must not act on each other: no batch norm in training mode.
        loss_rows: `(output, batch) -> (rows,)`, a loss for each row.
        chunk_size: how many rows to run at once, to save memory; None for all. Every tensor of the batch whose first axis is its rows is
            cut, and `loss_rows` is given the part: it must take labels from there.
        row_map: from a batch, or a part of it, the `row_map` of `adapt.mixed`, for targets whose input has the rows elsewhere.

    Returns:
        A function of params and batch that gives a tree like `params` with a leading axis of rows; of no rows, as a sampler that draws each
        row by chance may give, one of length 0.

    Raises:
        ValueError: where `loss_rows` does not give one loss for each row, or `chunk_size` is not positive.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> grads = ll.per_example_grad(adapt, lambda output, batch: output.square().sum(-1))
        >>> grads(adapt.init(seed=0), torch.randn(5, 8))["0"]["B"].shape
        torch.Size([5, 4, 2])
    """
    require_rowwise("per_example_grad", adapt, loss_rows, chunk_size, row_map)

    def grads_by_row(params: AnyTree, batch: Any) -> Tree:
        adapt._require(params, "per_example_grad")
        parts = []
        for part, rows in chunks(batch, chunk_size, "per_example_grad"):
            members = tree_map(lambda p, rows=rows: _each_row(p, rows), params)
            total = _total("per_example_grad", adapt, loss_rows, part, rows, row_map)
            parts.append(value_and_grad(total)(members)[1] if rows else tree_map(torch.zeros_like, members))
        return parts[0] if len(parts) == 1 else _joined(parts)

    return grads_by_row


def per_example_norm(
    adapt: Adapt, loss_rows: LossRows, chunk_size: int | None = None, row_map: Callable[[Any], RowMap] | None = None
) -> Callable[[AnyTree, Any], Tensor]:
    """Make `(params, batch) -> norms of the per-example gradients`, over the whole tree, without holding the gradients.

    A leaf's per-example gradients are squared, summed and freed as soon as the backward pass has made them. So those of about one target
    are in memory at a time. Inside another transform or a compiled function, which offer no such hook, they are all made first.

    Args:
        adapt: the adapted model, as for `per_example_grad`.
        loss_rows: `(output, batch) -> (rows,)`, a loss for each row.
        chunk_size: how many rows to run at once; None for all.
        row_map: as for `per_example_grad`.

    Returns:
        A function of params and batch that gives `(rows,)`, at least in float32.

    Raises:
        ValueError: as `per_example_grad`.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> norms = ll.per_example_norm(adapt, lambda output, batch: output.square().sum(-1))
        >>> norms(adapt.init(seed=0), torch.randn(5, 8)).shape
        torch.Size([5])
    """
    require_rowwise("per_example_norm", adapt, loss_rows, chunk_size, row_map)
    grads = per_example_grad(adapt, loss_rows, row_map=row_map)

    def norms(params: AnyTree, batch: Any) -> Tensor:
        adapt._require(params, "per_example_norm")
        found = []
        for part, rows in chunks(batch, chunk_size, "per_example_norm"):
            if differentiated_around() or not rows:
                squares = [_squares(grad) for grad in tree_leaves(grads(params, part))]
            else:
                squares = _squares_as_made(params, _total("per_example_norm", adapt, loss_rows, part, rows, row_map), rows)
            found.append(torch.stack(squares).sum(0).sqrt())
        return torch.cat(found)

    return norms


def _joined(parts: list[Tree]) -> Tree:
    """Join the rows of the parts one leaf at a time, and free the parts' leaf: all at once would hold everything twice."""
    layout = {path: list(leaves) for path, leaves in parts[0].items()}
    return {path: {name: torch.cat([part[path].pop(name) for part in parts]) for name in names} for path, names in layout.items()}


def _squares_as_made(params: AnyTree, total: Callable[[Tree], Tensor], rows: int) -> list[Tensor]:
    """Compute the squared norms by row of each leaf's gradients, while the backward pass runs."""
    squares: list[Tensor] = []

    def taken(leaf: Tensor) -> None:
        if leaf.grad is not None:
            squares.append(_squares(leaf.grad))
        leaf.grad = None

    # Leaves of the graph, not views of params in it: autograd hands a leaf its gradient at once, a view's only at the very end.
    members = tree_map(lambda p: _each_row(p.detach(), rows).requires_grad_(), params)
    for leaf in tree_leaves(members):
        leaf.register_post_accumulate_grad_hook(taken)
    with torch.enable_grad():
        value = total(members)
    if value.requires_grad:
        value.backward(inputs=tree_leaves(members))
    return squares or [torch.zeros(rows, device=value.device)]


def _squares(grad: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return torch.linalg.vector_norm(grad.reshape(len(grad), math.prod(grad.shape[1:])), dim=1, dtype=dtype).square()


def _each_row(p: Tensor, rows: int) -> Tensor:
    # Every row its own member: the gradient of the sum to member n is the gradient of row n.
    return p.unsqueeze(0).expand(rows, *p.shape)


def _total(
    call: str, adapt: Adapt, loss_rows: LossRows, batch: Any, rows: int, row_map: Callable[[Any], RowMap] | None
) -> Callable[[Tree], Tensor]:
    def total(members: Tree) -> Tensor:
        losses = loss_rows(adapt.mixed(members, batch, row_map=row_map and row_map(batch)), batch)
        if not isinstance(losses, Tensor) or losses.shape != (rows,):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"{call}: expected loss_rows to return shape ({rows},), found {found}. Give each row its "
                "loss, with labels from the batch that it is given."
            )
        return losses.sum()

    return total


def chunks(batch: Any, size: int | None, call: str) -> Iterator[tuple[Any, int]]:
    """Cut a batch into parts of at most `size` rows, each with its number of rows. With None the batch stays whole."""
    rows = rows_of(batch, call)
    if size is None or size >= rows:
        yield batch, rows
        return
    plain = dict(batch) if isinstance(batch, Mapping) else batch  # a mapping of another class is a leaf to pytree
    for start in range(0, rows, size):
        stop = min(start + size, rows)

        def cut(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return t[start:stop] if t.dim() and t.shape[0] == rows else t

        yield pytree.tree_map_only(Tensor, cut, plain), stop - start


def rows_of(batch: object, call: str = "per_example_grad") -> int:
    """Return the number of rows of a batch: the first axis of its first tensor, or of the first one inside of what it holds.

    Raises:
        ValueError: where it holds no tensor.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    for part in (*parts, *pytree.tree_leaves(list(parts))):
        if isinstance(part, Tensor) and part.dim():
            return int(part.shape[0])
    raise ValueError(
        f"{call}: expected a batch with a tensor whose first axis is its rows, found none. Pass tensors, by themselves or in dicts, tuples "
        "and lists."
    )


def require_rowwise(caller: str, adapt: Any, loss_rows: Any, chunk_size: Any, row_map: Any) -> None:
    """Refuse arguments of another type, as in another order, and a number of rows that is not positive.

    Raises:
        TypeError: for an `adapt` that is none, or functions that are none.
        ValueError: for a `chunk_size` that is neither None nor an integer of at least 1.
    """
    call = f"{caller}(adapt, loss_rows)(params, batch)"
    require_type(isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)
    require_type(callable(loss_rows), call, "loss_rows", "a function of the output and the batch", loss_rows)
    require_type(row_map is None or callable(row_map), call, "row_map", "a function of the batch", row_map)
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{caller}: expected chunk_size as an integer >= 1 or None, found {chunk_size!r}. Give the rows to run at once.")
