"""Tensors of PEFT's files that all layers of a variant share: they stand once, or in a copy for each layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lite.files.peft.row import Row
from lora_lite.files.peft.rows import rows_of


def split(method: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a file's tensors into those that all layers share, by whole keys, and the rest."""
    rest = dict(tensors)
    shared = {key: rest.pop(key) for row in rows_of(method) for key in keys_of(row) if key in rest}
    return shared, _without_copies(rest, shared)


def keys_of(row: Row) -> list[str]:
    """List the whole keys of what all layers of a method share."""
    return [*row.shared.values(), *(leaf.key for leaf in row.shared_leaves.values())]


def faults_of(method: str, shared: Mapping[str, Tensor]) -> list[str]:
    """List the trained tensors of all layers that a file lacks, or holds in another form."""
    faults = []
    for leaf in (leaf for row in rows_of(method) for leaf in row.shared_leaves.values()):
        tensor = shared.get(leaf.key)
        if tensor is None:
            faults.append(f'missing "{leaf.key}"')
        elif tensor.ndim != leaf.ndim or not tensor.is_floating_point():
            faults.append(f'"{leaf.key}": expected {leaf.ndim} axes of a floating dtype, found {tuple(tensor.shape)} of {tensor.dtype}')
    return faults


def leading(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the first entries of a file's tensor along each axis, as many as `like` has.

    A second adapter in PEFT has the projections of the first one, which may have wider layers. It takes this part of them."""
    return tensor[tuple(map(slice, like.shape))] if tensor.ndim == like.ndim else tensor


def _without_copies(tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the copies of shared tensors that a file holds for each layer. A copy that differs stays, as a tensor without a place."""
    of_name = {key.rpartition(".")[2]: tensor for key, tensor in shared.items()}
    whole = {name: of_name.get(name.rpartition(".")[2]) for name in tensors}
    return {name: t for name, t in tensors.items() if (same := whole[name]) is None or not torch.equal(same, t)}
