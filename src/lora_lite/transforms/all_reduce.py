"""Gradients averaged over the processes of a group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.core.tracing import transformed


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
    if transformed():
        raise RuntimeError(
            "all_reduce_mean: expected plain tensors, found a torch.func transform around it. Average what the transform returns."
        )
