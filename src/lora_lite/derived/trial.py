"""The trial that finds which targets' inputs are made of a batch's rows.

A layer's input need not have the rows of the batch on its first axis. Packed patches, tables of relative positions and time before rows are
cases in which an even division proves nothing. So the frozen model runs on one row and on two, and each target's input must grow by the row
that came in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.clone.per_call import Replica

Batch = tuple[Any, dict[str, Any]]
"""The arguments of a call: a batch, and keywords."""

_Call = tuple[Tensor | None, Mapping[str, Tensor | None]]


class Seen(NamedTuple):
    """The way in which a target's calls follow the rows: its input, and by their places the tensors beside it, where known."""

    follows: bool
    beside: Mapping[str, bool]


_CLOSE = 0.1
"""The distance, in norms, of inputs that count as equal: low dtypes round by the size of a batch, and other rows are about 1 away."""


def trial(replica: Replica, one: Batch, two: Batch) -> dict[str, Seen]:
    """Return, for each target that one row reaches, how its calls follow rows; nothing where the model refuses such a batch.

    The global random state is put back.

    Args:
        replica: the copy to run.
        one, two: a batch and its keywords, cut to one row and to two, as `cut` does it.
    """
    devices = {leaf.device for leaf in pytree.tree_leaves(two) if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            found = _grown(*(replica.inputs(*batch, _print) for batch in (one, two)), values=not replica.module.training)
            if replica.module.training:  # dropout draws otherwise: the order shows in evaluation mode
                still = _grown(*(_in_evaluation(replica, *batch) for batch in (one, two)), values=True)
                found = {
                    path: still.get(path, seen)._replace(follows=seen.follows and still.get(path, seen).follows)
                    for path, seen in found.items()
                }
            return found
        except Exception:  # whatever the model does not like about a part of its batch: then only its own rows are known
            return {}


def _in_evaluation(replica: Replica, batch: Any, kwargs: dict[str, Any]) -> Mapping[str, Sequence[_Call]]:
    modes = [(module, module.training) for module in replica.module.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return replica.inputs(batch, kwargs, _print)
    finally:
        for module, mode in modes:
            module.training = mode


def cut(plain: Batch, rows: int, n: int) -> Batch:
    """Return the batch's first row `n` times. Each is masked one position earlier than the last, as a shorter text is."""

    def of_first(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != rows:
            return leaf
        copies = leaf[:1].repeat(n, *[1] * (leaf.dim() - 1))
        if "mask" in pytree.keystr(path) and leaf.dim() == 2:
            for k in range(n):  # the first too: a mask of ones alone is none to many models
                copies[k, max(1, leaf.shape[1] - k - (leaf.shape[1] > 2)) :] = 0
        return copies

    parts: Batch = pytree.tree_map_with_path(of_first, plain)
    return parts


def _print(x: Any) -> Tensor | None:
    """Return a projection and the norm of each entry of an input's first axis, `(n, 2)`, by which the entry is known again."""
    if not isinstance(x, Tensor) or not x.dim():
        return None
    flat = x.reshape(len(x), -1).to(torch.float32 if x.is_floating_point() else torch.float64)
    weights = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device).mul(1.7).cos()  # a plain sum is zero after LayerNorm
    return torch.stack([flat @ weights, torch.linalg.vector_norm(flat, dim=1)], 1)


def _grown(one: Mapping[str, Sequence[_Call]], two: Mapping[str, Sequence[_Call]], *, values: bool) -> dict[str, Seen]:
    """Return, for each target, whether its inputs on two rows are those on one row and as much again, and so for what is beside them."""
    found = {}
    for path, calls in one.items():
        pairs, even = list(zip(calls, two.get(path, []), strict=False)), len(calls) == len(two.get(path, []))
        follows = even and all(_twice(a, b, values) for (a, _), (b, _) in pairs)
        names = dict.fromkeys(name for _, beside in calls for name in beside)
        kinds = {name: {_follows(a.get(name), b.get(name), values) for (_, a), (_, b) in pairs} for name in names}
        known = {name: kind.pop() for name, kind in kinds.items() if even and len(kind) == 1}
        found[path] = Seen(follows, {name: kind for name, kind in known.items() if kind is not None})
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
