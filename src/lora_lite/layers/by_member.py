"""The tensors of a call taken apart by the members of a mixed batch, and the members' outputs joined again."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.core.frozen import Params
from lora_lite.core.tracing import vmap_rows


def taken(value: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the entries of some of `count` rows; the first axis has one or several for each."""
    if not count or value.shape[0] % count:
        raise ValueError(f"expected tensors with a multiple of {count} rows, found shape {tuple(value.shape)}.")
    return value.unflatten(0, (count, -1))[rows].flatten(0, 1)


def tensors_in(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of arguments by their places."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(tree) if isinstance(leaf, Tensor)}


def require_entries(found: Any, count: int) -> None:
    """Refuse results of another length than the input's.

    Raises:
        ValueError: with the way out.
    """
    if odd := [tuple(y.shape) for y in tensors_in(found).values() if y.shape[0] != count]:
        raise ValueError(
            f"expected a module whose outputs have the {count} entries of its input on their first axis, found shape {odd[0]}, "
            "and the model has not let its rows be tried. Train a part of it that returns rows, or run the members one by one."
        )


def require_unwritten(names: str) -> None:
    """Refuse a module that writes to what it is called with: a member's call is given copies, and what is written there would be lost.

    Raises:
        ValueError: with the `names`, if there are any, and the way out.
    """
    if names:
        raise ValueError(
            f"expected a module that leaves its arguments as they are, found that it writes to {names}. Train a part of it that does not, "
            "or run the members one by one."
        )


def by_rows(value: Any, count: int) -> Any:
    """Lay an output out by the rows that it is of. One entry for all is each row's."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() and len(value) == 1 < count:
        return value[None].expand(count, *value.shape)
    if not value.dim() or value.shape[0] % max(count, 1):
        raise ValueError(
            f"expected outputs with the rows of their batch on the first axis, found shape {tuple(value.shape)} of {count} rows. Train "
            "a part of it that returns rows, or run the members one by one."
        )
    return value.unflatten(0, (count, -1)) if count else value[:, None]


def joined(parts: Sequence[Any], order: Tensor) -> Any:
    """Join the members' outputs in the order of the batch."""
    return torch.cat(list(parts))[order].flatten(0, 1) if isinstance(parts[0], Tensor) else parts[0]


def mapped_beside(one: Callable[..., Any], params: Params, rows: int, x: Tensor, rest: Any, spread: Collection[str]) -> Any:
    """Map a call over the rows of its input and of tensors beside it, as compiled code does, which knows no member's number of rows.

    Args:
        one: `(params, x, args, kwargs)`, the call with the params of one member.
        params: of each of the `rows`.
        x: the input, with one entry or several for each row.
        rest: the other arguments, by place and by name.
        spread: the places in `rest` of the tensors that have the rows.
    """
    beside = {name: t for name, t in tensors_in(rest).items() if name in spread}

    def of_row(p: Params, x: Tensor, *parts: Tensor) -> Any:
        now = dict(zip(beside, parts))
        return one(p, x, *pytree.tree_map_with_path(lambda path, value: now.get(pytree.keystr(path), value), rest))

    each = [t.unflatten(0, (rows, -1)) for t in (x, *beside.values())]
    return pytree.tree_map_only(Tensor, lambda y: y.flatten(0, 1), vmap_rows(of_row, params, *each))


def moved(value: Any, axis: int, to: int) -> Any:
    """Return an output with an axis of its tensors at another place."""
    return pytree.tree_map_only(Tensor, lambda t: t.movedim(axis, to) if t.dim() > max(axis, to) else t, value)


def moved_rows(own: Callable[..., Any], axis: int) -> Callable[..., Any]:
    """Return a module's forward for an input with rows first, where the module has them at `axis`. So are the rows of the result."""
    return lambda x, *args, **kwargs: moved(own(x.movedim(0, axis), *args, **kwargs), axis, 0)
