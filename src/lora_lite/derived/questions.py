"""Whether targets' inputs follow the rows of a batch, as a question that the processes of a sharded model answer together.

A trial gathers the base's weights, in which every process takes part. So in each mixed call they tell one another whose batch is still to
be tried, and all of them try it, on the same rows: with one model and one batch they issue the same collectives, and find the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.derived.trial import Batch


@dataclass(frozen=True)
class Question:
    """A batch whose rows are to be followed.

    Attributes:
        key: its structure.
        mapped: the targets of which the caller says where the rows are.
        runs: the batch as `runs_of` cuts it; None where the answer is known already, or no trial can be made.
    """

    key: tuple[Any, ...]
    mapped: tuple[str, ...]
    runs: Sequence[Batch] | None


def asked(own: Question | None, group: Any) -> Iterator[Question]:
    """Yield the questions of all processes of a group, by rank; without one the own.

    Args:
        own: the question of this process; None where its batch has no rows to follow.
        group: a process group, each of which calls this; None without one.
    """
    if group is None:
        yield from () if own is None else (own,)
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own and replace(own, runs=pytree.tree_map_only(Tensor, _Sent.of, own.runs)), group=group)
    for question in everyone:
        if question is not None:
            yield replace(question, runs=pytree.tree_map_only(_Sent, _Sent.here, question.runs))


@dataclass(frozen=True)
class _Sent:
    """A tensor between processes, with the sort of device that it is on in each of them."""

    tensor: Tensor
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> "_Sent":
        return cls(tensor.cpu(), tensor.device.type)

    def here(self) -> Tensor:
        return self.tensor.to(self.device)
