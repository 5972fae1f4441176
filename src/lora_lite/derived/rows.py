"""The rows of a target's input that belong to each row of the batch.

A layer's input need not have the rows of the batch on its first axis. Packed patches, tables of relative positions and time before rows are
cases in which an even division proves nothing. So the frozen model runs on one row and on two, and each target's input must grow by the row
that came in.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.clone.per_call import Replica, Rows
from lora_lite.core.errors import listed
from lora_lite.core.tracing import in_transform

RowMap = Mapping[str, Tensor | Sequence[int] | int]

_CLOSE = 0.1
"""The distance, in norms, of inputs that count as equal: low dtypes round by the size of a batch, and other rows are about 1 away."""
_PLAIN = (Tensor, int, float, str, bool, type(None), torch.dtype)


_Call = tuple[Any, dict[str, Any]]  # the prints of an input and of the tensors beside it


class _Seen(NamedTuple):
    """Whether a target's input follows the rows, and by their places whether the tensors beside it do; those of which that is known."""

    follows: bool
    beside: Mapping[str, bool]


class Followed:
    """The targets whose input follows the batch's rows, by the structure of a batch."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, _Seen]] = {}

    def rows(
        self,
        replica: Replica,
        batch: Any,
        kwargs: Mapping[str, Any],
        members: int,
        index: Tensor | None,
        row_map: RowMap | None = None,
        tried: bool = True,
    ) -> Rows:
        """Return the batch's rows, and the targets whose input is known to be made of them, at their first axis and in their order.

        The first batch with rows of a shape runs the frozen model on its first row, alone and beside itself, unless the batch holds
        objects that a run may change, such as a cache. The global random state is put back. What compiles is not tried.

        Args:
            replica: the copy to run.
            batch, kwargs: as in `adapt.mixed`.
            members: of the stack.
            index: the member of each row; None for `members` equal contiguous groups.
            row_map: what the caller says of targets whose input has the rows elsewhere.
            tried: whether the model can be tried.

        Raises:
            ValueError: where a target's input is known not to be, the rows make no equal groups, or `row_map` names no target or no row.
            TypeError: where `row_map` holds no integers.
        """
        plain = (dict(batch) if isinstance(batch, Mapping) else batch, dict(kwargs))
        leaves = pytree.tree_leaves_with_path(plain)
        lengths = [len(leaf) for _, leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        rows = _rows(lengths, members) if index is None else len(index)
        mapped = _mapped(row_map or {}, [path for path, _ in replica.bindings], rows, members, index)
        if not tried or rows < 2 or torch.compiler.is_compiling():
            return Rows(mapped=mapped)
        key = tuple((pytree.keystr(path), *_facts(leaf, rows)) for path, leaf in leaves)
        if key not in self._known:
            can = rows in lengths and all(isinstance(leaf, _PLAIN) for _, leaf in leaves)
            self._known[key] = _try(replica, plain, rows) if can else {}
        known = self._known[key]
        lost = [path for path, seen in known.items() if not seen.follows and path not in mapped]
        if lost:
            more = f", as at {len(lost) - 1} more targets" if lost[1:] else ""
            raise ValueError(
                f'adapt.mixed: at "{lost[0]}" expected an input whose first axis is made of the batch\'s rows, found one that does not '
                f"grow with them{more}. Leave such layers out with exclude_names, or run the members one by one, or tell "
                "with row_map where the rows are."
            )
        return Rows(rows, frozenset(known), mapped, {path: seen.beside for path, seen in known.items()})


def _mapped(row_map: RowMap, paths: Sequence[str], rows: int, members: int, index: Tensor | None) -> dict[str, Tensor | int]:
    """Return for each target that `row_map` names the axis of the rows, or the member of each entry of its input's first axis."""
    found: dict[str, Tensor | int] = {}
    for pattern, places in row_map.items():
        named = [path for path in paths if re.search(pattern, path)]
        if not named:
            raise ValueError(f"adapt.mixed: expected row_map to name targets, found none for {pattern!r}. Targets are {listed(paths)}.")
        found |= dict.fromkeys(named, places if isinstance(places, int) else _members_of(pattern, places, rows, members, index))
    return found


def _members_of(pattern: str, places: Tensor | Sequence[int], rows: int, members: int, index: Tensor | None) -> Tensor:
    own = torch.as_tensor(places)
    if own.dim() != 1 or own.is_floating_point() or own.is_complex() or own.dtype == torch.bool:
        raise TypeError(
            f"adapt.mixed: expected row_map to give {pattern!r} an axis, or the row of each entry as a vector of integers, found "
            f"{own.dtype} of shape {tuple(own.shape)}."
        )
    if index is None:
        index = torch.arange(members, device=own.device).repeat_interleave(rows // members)
    if own.device.type == "cpu" and not in_transform() and len(own) and not (own.min() >= 0 and own.max() < rows):
        wrong = own[(own < 0) | (own >= rows)][0]
        raise ValueError(f"adapt.mixed: expected row_map to give {pattern!r} rows in 0..{rows - 1}, found {int(wrong)}.")
    return index[own.to(index.device, torch.long)]


def _rows(lengths: list[int], members: int) -> int:
    """Return the rows of a batch that come in equal groups, one for each member; of tensors of several lengths the first that can."""
    found = next((n for n in lengths if n % members == 0), None if lengths else members)
    if found is None:
        raise ValueError(
            f"adapt.mixed: at the batch expected an input with a multiple of {members} rows, found {lengths[0]}. Give each row its member: "
            "adapt.mixed(stacked, batch, index)."
        )
    return found


def _facts(leaf: Any, rows: int) -> tuple[Any, ...]:
    """Return everything about a part of a batch that a trial may depend on, but for its values and the number of rows."""
    if not isinstance(leaf, Tensor):
        return (type(leaf), leaf if isinstance(leaf, bool | int | str) else None)
    own = leaf.dim() > 0 and leaf.shape[0] == rows
    return (leaf.dtype, own, tuple(leaf.shape[1:] if own else leaf.shape))


def _try(replica: Replica, plain: tuple[Any, dict[str, Any]], rows: int) -> dict[str, _Seen]:
    """Return, for each target that one row reaches, how its calls follow rows; nothing where the model refuses such a batch."""
    devices = {leaf.device for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            found = _grown(*(replica.inputs(*_cut(plain, rows, n), _print) for n in (1, 2)), values=not replica.module.training)
            if replica.module.training:  # dropout draws otherwise: the order shows in evaluation mode
                still = _grown(*(_in_evaluation(replica, *_cut(plain, rows, n)) for n in (1, 2)), values=True)
                found = {
                    path: still.get(path, seen)._replace(follows=seen.follows and still.get(path, seen).follows)
                    for path, seen in found.items()
                }
            return found
        except Exception:  # whatever the model does not like about a part of its batch: then only its own rows are known
            return {}


def _in_evaluation(replica: Replica, batch: Any, kwargs: dict[str, Any]) -> dict[str, list[_Call]]:
    modes = [(module, module.training) for module in replica.module.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return replica.inputs(batch, kwargs, _print)
    finally:
        for module, mode in modes:
            module.training = mode


def _cut(plain: tuple[Any, dict[str, Any]], rows: int, n: int) -> tuple[Any, dict[str, Any]]:
    """Return the batch's first row `n` times. Each is masked one position earlier than the last, as a shorter text is."""

    def cut(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != rows:
            return leaf
        copies = leaf[:1].repeat(n, *[1] * (leaf.dim() - 1))
        if "mask" in pytree.keystr(path) and leaf.dim() == 2:
            for k in range(n):  # the first too: a mask of ones alone is none to many models
                copies[k, max(1, leaf.shape[1] - 1 - k) :] = 0
        return copies

    parts: tuple[Any, dict[str, Any]] = pytree.tree_map_with_path(cut, plain)
    return parts


def _print(x: Any) -> Tensor | None:
    """Return a projection and the norm of each entry of an input's first axis, `(n, 2)`, by which the entry is known again."""
    if not isinstance(x, Tensor) or not x.dim():
        return None
    flat = x.reshape(len(x), -1).to(torch.float32 if x.is_floating_point() else torch.float64)
    weights = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device).mul(1.7).cos()  # a plain sum is zero after LayerNorm
    return torch.stack([flat @ weights, torch.linalg.vector_norm(flat, dim=1)], 1)


def _grown(one: Mapping[str, list[_Call]], two: Mapping[str, list[_Call]], *, values: bool) -> dict[str, _Seen]:
    """Return, for each target, whether its inputs on two rows are those on one row and as much again, and so for what is beside them."""
    found = {}
    for path, calls in one.items():
        pairs, even = list(zip(calls, two.get(path, []), strict=False)), len(calls) == len(two.get(path, []))
        follows = even and all(_twice(a, b, values) for (a, _), (b, _) in pairs)
        names = dict.fromkeys(name for _, beside in calls for name in beside)
        kinds = {name: {_follows(a.get(name), b.get(name), values) for (_, a), (_, b) in pairs} for name in names}
        known = {name: kind.pop() for name, kind in kinds.items() if even and len(kind) == 1}
        found[path] = _Seen(follows, {name: kind for name, kind in known.items() if kind is not None})
    return found


def _follows(one: Tensor | None, two: Tensor | None, values: bool) -> bool | None:
    """Whether a tensor beside an input grew by a row, or stayed as it was; None where neither is plain."""
    if one is None or two is None:
        return False if one is two else None  # both are numbers
    if _twice(one, two, values):
        return True
    same = one.shape == two.shape and bool((one - two).abs().max() <= _CLOSE * one[:, 1].max() if len(one) else True)
    return False if same else None


def _twice(one: Tensor | None, two: Tensor | None, values: bool) -> bool:
    if one is None or two is None or len(two) != 2 * len(one):
        return False
    if not values or not len(one):
        return True
    far = (two[: len(one)] - one)[:, 0].abs().max()
    return bool(far <= _CLOSE * one[:, 1].max()) if one.dtype == torch.float32 else not far
