"""What the processes of a group exchange: averaged gradients, and the sums of statistics. Nothing else here needs a group."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree


def all_reduce_mean(tree: Any, group: Any = None) -> Any:
    """Average a tree over the processes of a group, in one collective over all its leaves.

    Every process calls this, with a tree of the same layout. The leaves travel as one vector in the widest dtype among them; each comes
    back in its own.

    Args:
        tree: floating tensors on one device, in any nest of dicts, lists and tuples: gradients, or `(value, gradients)`.
        group: a process group; None for all processes.

    Returns:
        A tree of the same layout with new tensors, the same on every process.

    Raises:
        RuntimeError: where no process group was initialised, or inside a transform.
        TypeError: where a leaf is no floating tensor.

    Example:
        >>> import torch, torch.distributed as dist, lora_lite as ll
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ll.all_reduce_mean({"0": {"A": torch.tensor([2.0, 4.0])}})
        {'0': {'A': tensor([2., 4.])}}
        >>> dist.destroy_process_group()
    """
    _require_group()
    leaves, spec = pytree.tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"all_reduce_mean: expected floating tensors, found {found}. Average counts as floats, leave the rest out.")
    if not leaves:
        return tree
    flat = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])  # cat promotes to the widest dtype
    dist.all_reduce(flat, group=group)
    parts = flat.div_(dist.get_world_size(group)).split([leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([part.view(leaf.shape).to(leaf.dtype, copy=True) for part, leaf in zip(parts, leaves)], spec)


def _require_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_reduce_mean: expected an initialised process group, found none. Call torch.distributed.init_process_group in every "
            "process."
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "all_reduce_mean: expected plain tensors, found a torch.func transform around it. Average what the transform returns."
        )


def merged_over_ranks(states: Mapping[str, Any], seen: int, group: Any) -> tuple[dict[str, Any], int]:
    """Merge each path's statistics over the processes of a group, in order of rank, so that every process gets the same to the bit.

    Args:
        states: this process's statistics by path, the same paths in every process; what several paths share is exchanged once.
        seen: batches that this process saw.
        group: the process group.

    Returns:
        The merged statistics, on the CPU, and the batches that all processes saw.
    """
    first = {id(state): k for k, state in reversed(list(enumerate(states.values())))}
    notes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(notes, (seen, [first[id(state)] for state in states.values()]), group)
    # Paths share a statistic if they do in every process: one that saw no token holds a single empty one for all.
    shares = list(zip(*(pattern for _, pattern in notes)))
    merged: dict[tuple[int, ...], Any] = {}
    for share, state in zip(shares, states.values()):
        if share not in merged:
            merged[share] = _merged(state.to("cpu"), group)
    return {path: merged[share] for path, share in zip(states, shares)}, sum(seen for seen, _ in notes)


def _merged(state: Any, group: Any) -> Any:
    total = None
    for rank in range(dist.get_world_size(group)):  # one other process's at a time, so that memory does not grow with their number
        sent = [state if rank == dist.get_rank(group) else None]
        dist.broadcast_object_list(sent, group=group, group_src=rank)
        total = sent[0] if total is None else total.merge(sent[0])
    return total
