"""The trial that finds which targets' inputs are made of a batch's rows.

A layer's input need not have the rows of the batch on its first axis. Packed patches, tables of relative positions and time before rows are
cases in which an even division proves nothing. So the frozen model runs on one row and on two, and each target's input must grow by the row
that came in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.clone.per_call import Replica

Batch = tuple[Any, dict[str, Any]]
"""The arguments of a call: a batch, and keywords."""

_CLOSE = 0.1
"""The distance, in norms, of inputs that count as equal: low dtypes round by the size of a batch, and other rows are about 1 away."""


def trial(replica: Replica, one: Batch, two: Batch) -> dict[str, bool]:
    """Return, for each target that one row reaches, whether its input follows rows; nothing where the model refuses such a batch.

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
                found = {path: follows and still.get(path, True) for path, follows in found.items()}
            return found
        except Exception:  # whatever the model does not like about a part of its batch: then only its own rows are known
            return {}


def _in_evaluation(replica: Replica, batch: Any, kwargs: dict[str, Any]) -> dict[str, list[Tensor | None]]:
    modes = [(module, module.training) for module in replica.module.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return replica.inputs(batch, kwargs, _print)
    finally:
        for module, mode in modes:
            module.training = mode


def cut(plain: Batch, rows: int, n: int) -> Batch:
    """Return the batch's first row `n` times. The last time it is masked one position earlier, as a shorter text is."""

    def of_first(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != rows:
            return leaf
        first = leaf[:1]
        last = first
        if n > 1 and "mask" in pytree.keystr(path) and leaf.dim() == 2 and leaf.shape[1] > 1:
            last = torch.cat([first[:, :-1], torch.zeros_like(first[:, -1:])], 1)
        return first if n == 1 else torch.cat([first, last])

    parts: Batch = pytree.tree_map_with_path(of_first, plain)
    return parts


def _print(x: Any) -> Tensor | None:
    """Return a projection and the norm of each entry of an input's first axis, `(n, 2)`, by which the entry is known again."""
    if not isinstance(x, Tensor) or not x.dim():
        return None
    flat = x.reshape(len(x), -1).to(torch.float32 if x.is_floating_point() else torch.float64)
    weights = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device).mul(1.7).cos()  # a plain sum is zero after LayerNorm
    return torch.stack([flat @ weights, torch.linalg.vector_norm(flat, dim=1)], 1)


def _grown(one: Mapping[str, list[Tensor | None]], two: Mapping[str, list[Tensor | None]], *, values: bool) -> dict[str, bool]:
    """Return, for each target, whether its inputs on two rows are those on one row, and as much again."""
    pairs = {path: (seen, two.get(path, [])) for path, seen in one.items()}
    return {path: len(a) == len(b) and all(map(_twice, a, b, [values] * len(a))) for path, (a, b) in pairs.items()}


def _twice(one: Tensor | None, two: Tensor | None, values: bool) -> bool:
    if one is None or two is None or len(two) != 2 * len(one):
        return False
    if not values or not len(one):
        return True
    far = (two[: len(one)] - one)[:, 0].abs().max()
    return bool(far <= _CLOSE * one[:, 1].max()) if one.dtype == torch.float32 else not far
