"""Statistics merged over the processes of a group."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from lora_lite.core.errors import require_type


def merged_over_ranks(states: Mapping[str, Any], seen: int, group: Any) -> tuple[dict[str, Any], int]:
    """Merge each path's statistics over the processes of a group, in order of rank, so that every process gets the same to the bit.

    Args:
        states: this process's statistics by path, the same paths in every process. A statistic that several paths share is exchanged once.
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


def require_group(usage: str, group: object) -> None:
    """Raise a TypeError unless an argument is a process group, or None."""
    ok = group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup))
    require_type(ok, usage, "group", "a torch.distributed process group", group)


def _merged(state: Any, group: Any) -> Any:
    total = None
    for rank in range(dist.get_world_size(group)):  # one other process's at a time, so that memory does not grow with their number
        sent = [state if rank == dist.get_rank(group) else None]
        dist.broadcast_object_list(sent, group=group, group_src=rank)
        total = sent[0] if total is None else total.merge(sent[0])
    return total
