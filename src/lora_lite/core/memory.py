"""The memory in which tensors lie: which of them are one, and which lie on one another without being one."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_lite.core.tracing import valueless


class Place(NamedTuple):
    """The memory of a tensor, equal for tensors that are one; lengths are in bytes.

    Attributes:
        storage: what tells its storage from others.
        begin, end: its first byte there, and the byte after its last.
        layout: its shape, strides and dtype.
        pitch, width: of a matrix with contiguous rows, from one row to the next and of a row; 0 for another layout.
    """

    storage: Hashable
    begin: int = 0
    end: int = 1
    layout: Hashable = None
    pitch: int = 0
    width: int = 0

    def overlaps(self, other: "Place") -> bool:
        """Whether both may have an element in common. Two blocks of columns of one matrix have none, though their rows alternate."""
        if self.storage != other.storage or self.begin >= other.end or other.begin >= self.end:
            return False
        if not self.pitch or self.pitch != other.pitch:
            return True
        first, second = self.begin % self.pitch, other.begin % self.pitch
        return not (first + self.width <= second or second + other.width <= first)


def place_in_memory(tensor: Tensor) -> Place:
    """Return the memory of a tensor. One that has none of its own, on meta or made of other tensors, has a place that no other has.

    Sparse and nested tensors are made of others, and those of oneDNN do not show their memory.
    """
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel() or valueless(tensor):
        return Place(id(tensor))
    if is_traceable_wrapper_subclass(tensor) or not (start := tensor.untyped_storage().data_ptr()):
        return Place(id(tensor))
    shape, stride, size = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    end = begin + (1 + sum((n - 1) * step for n, step in zip(shape, stride))) * size
    by_rows = len(shape) == 2 and stride[1] == 1 and stride[0] >= shape[1]
    pitch, width = (stride[0] * size, shape[1] * size) if by_rows else (0, 0)
    return Place((tensor.device, start), begin, end, (shape, stride, tensor.dtype), pitch, width)
