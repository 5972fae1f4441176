"""The trial that finds which targets' inputs are made of a batch's rows.

A layer's input need not have the rows of the batch on its first axis, nor in their order. Packed patches, tables of relative positions,
time before rows, rows sorted by their length and experts that see some tokens are cases in which an even division proves nothing. So the
frozen model runs on two rows, alone and side by side in either order, and each target's input must be made of what the rows gave alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.clone.per_call import Call, Replica
from lora_lite.core.errors import NO_ANSWER

Batch = tuple[Any, dict[str, Any]]
"""The arguments of a call: a batch, and keywords."""


class Seen(NamedTuple):
    """The way in which a target's calls follow the rows: its input, and by their places the tensors beside it, where known.

    Attributes:
        follows: whether the first axis of its inputs has the rows, in their order.
        beside: by place, the entries on the first axis of a tensor beside an input that all rows share, 0 where they are the rows.
        each: the entries of that axis for each row, of all its calls.
        returns: whether all tensors of its results have the rows there, or one entry for all, of a target that is asked for them.
    """

    follows: bool
    beside: Mapping[str, int]
    each: frozenset[int] = frozenset()
    returns: bool = True


_NEAR = 0.1
"""The distance, in norms, of inputs that count as equal: low dtypes round by the size of a batch, and other rows are about 1 away."""
_PROJECTIONS = 16
_EXACT = 1e-10
"""The distance of ids and masks that count as equal: only their projections, in float64, are rounded."""
_LARGEST = 1e6
"""The largest number that is looked at as it is: masks that are added have the lowest of their dtype, whose sums are infinite."""


def trial(replica: Replica, runs: Sequence[Batch]) -> dict[str, Seen]:
    """Return, for each target that a row reaches, how its calls follow rows; nothing where the model refuses such a batch.

    The global random state is put back.

    Args:
        replica: the copy to run.
        runs: a batch and its keywords as `runs_of` cuts them.

    Raises:
        RuntimeError: where the device fails or has no memory left.
    """
    devices = {leaf.device for leaf in pytree.tree_leaves(runs) if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            found = _followed([replica.seen(*batch, _print) for batch in runs], values=not replica.module.training)
            if replica.module.training:  # dropout draws otherwise: the order shows in evaluation mode
                still = _followed([_in_evaluation(replica, *batch) for batch in runs], values=True)
                found = {
                    path: (now := still.get(path, seen))._replace(
                        follows=seen.follows and now.follows, returns=seen.returns and now.returns
                    )
                    for path, seen in found.items()
                }
            return found
        except NO_ANSWER:
            raise
        except Exception:  # whatever the model does not like about a part of its batch: then only its own rows are known
            return {}


def _in_evaluation(replica: Replica, batch: Any, kwargs: dict[str, Any]) -> Mapping[str, Sequence[Call]]:
    modes = [(module, module.training) for module in replica.module.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return replica.seen(batch, kwargs, _print)
    finally:
        for module, mode in modes:
            module.training = mode


def runs_of(plain: Batch, rows: int) -> tuple[Batch, Batch, Batch, Batch]:
    """Return the batch cut to its first row, to the row most unlike it, to both, and to both the other way round."""
    other = _unlike_first(plain, rows)
    alone, beside, both, swapped = (_cut(plain, rows, picked) for picked in ([0], [other], [0, other], [other, 0]))
    return alone, beside, both, swapped


def _own(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows


def _unlike_first(plain: Batch, rows: int) -> int:
    """Return the row that differs from the first in the most parts of the batch: a sort by one of them tells the two apart."""
    differs = torch.zeros(rows, dtype=torch.int64, device="cpu")
    for leaf in pytree.tree_leaves(plain):
        if _own(leaf, rows):
            differs += (leaf != leaf[:1]).reshape(rows, -1).any(1).cpu()
    return int(differs[1:].argmax()) + 1


def _cut(plain: Batch, rows: int, picked: Sequence[int]) -> Batch:
    """Return some rows of the batch. Any but the first is masked one position earlier than it, as a shorter text is."""

    def of_rows(path: Any, leaf: Any) -> Any:
        if not _own(leaf, rows):
            return leaf
        part = leaf[list(picked)]
        if "mask" in pytree.keystr(path) and leaf.dim() == 2:
            for k, row in enumerate(picked):  # the first too: a mask of ones alone is none to many models
                part[k, max(1, leaf.shape[1] - (row > 0) - (leaf.shape[1] > 2)) :] = 0
        return part

    parts: Batch = pytree.tree_map_with_path(of_rows, plain)
    return parts


def _print(x: Any) -> Tensor | None:
    """Return projections and the norm of each entry of an input's first axis, `(n, projections + 1)`, by which the entry is known again.

    They are at random, and several: two rows are seldom near in one direction, and never in all. The same are drawn each time.
    """
    if not isinstance(x, Tensor) or not x.dim():
        return None
    width = x.shape[-1] if x.dim() > 1 else 1
    flat = x.reshape(len(x), math.prod(x.shape[1:-1]), width)
    flat = flat.to(torch.float32).clamp(-_LARGEST, _LARGEST) if x.is_floating_point() else flat.to(torch.float64)
    generator = torch.Generator("cpu").manual_seed(0)
    across, along = (
        torch.randn(n, _PROJECTIONS, generator=generator, dtype=torch.float64, device="cpu").to(flat.device, flat.dtype)
        for n in flat.shape[1:]
    )
    seen = ((flat @ along) * across.sign()).sum(1) / math.sqrt(_PROJECTIONS)
    return torch.cat([seen, torch.linalg.vector_norm(flat, dim=(1, 2))[:, None]], 1)


def _followed(runs: Sequence[Mapping[str, Sequence[Call]]], *, values: bool) -> dict[str, Seen]:
    """Return, for each target, whether its inputs on two rows are those on each of them, and so for what is beside them."""
    found = {}
    for path in dict.fromkeys(path for run in runs for path in run):
        calls = [run.get(path, []) for run in runs]
        steps, even = list(zip(*calls, strict=False)), len({len(run) for run in calls}) == 1  # of each call of the target, all runs
        follows = even and all(_joined([call.given for call in step], values) for step in steps)
        names = dict.fromkeys(name for run in calls for call in run for name in call.beside)
        kinds = {name: {_follows([call.beside.get(name) for call in step], values) for step in steps} for name in names}
        known = {name: kind.pop() for name, kind in kinds.items() if even and len(kind) == 1}
        each = frozenset(len(call.given) for call in calls[0] if call.given is not None)
        out = {name for run in calls for call in run for name in call.results}
        returns = even and all(_returned([call.results.get(name) for call in step], values) for step in steps for name in out)
        found[path] = Seen(follows, {name: kind for name, kind in known.items() if kind is not None}, each, returns)
    return found


def _follows(runs: Sequence[Tensor | None], values: bool) -> int | None:
    """Return the entries of a tensor that is the same whatever the rows are, 0 for one made of them; None where neither is plain."""
    first = runs[0]
    if first is None or any(run is None for run in runs):
        return None if any(run is not None for run in runs) else 1  # all are numbers
    if _joined(runs, values):
        return 0
    same = all(run is not None and run.shape == first.shape and _close(run, first) for run in runs)
    return len(first) if same else None


def _returned(runs: Sequence[Tensor | None], values: bool) -> bool:
    """Whether a result has the rows, or is one entry for all of them, such as a bias of positions: that is repeated for each row."""
    return runs[0] is not None and _follows(runs, values) in (0, 1)


def _joined(runs: Sequence[Tensor | None], values: bool) -> bool:
    """Whether the inputs of two rows side by side, in either order, are those of each row alone."""
    one, other, both, swapped = runs
    if one is None or other is None or both is None or swapped is None:
        return False
    if not len(one) == len(other) == len(both) / 2 == len(swapped) / 2:
        return False
    return not values or (_close(both, torch.cat([one, other])) and _close(swapped, torch.cat([other, one])))


def _close(a: Tensor, b: Tensor) -> bool:
    if not len(a):
        return True
    near = _NEAR if a.dtype == torch.float32 else _EXACT
    return bool((a - b)[:, :-1].norm(dim=1).max() <= near * b[:, -1].max())
