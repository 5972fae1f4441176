"""Measure in several fresh processes and pool their rounds.

Where a process happens to lay out its memory makes some of its calls faster and others slower for as long as it lives, by more than its
rounds differ among themselves; and over minutes the machine drifts. So each measurement is taken in several processes that lie far apart:
a spread over the rounds of all of them holds both, and another run falls into it.

A new process on Linux gives memory back to the system and asks for it again, page by page, until it has once freed a large block: glibc
then keeps as much. What ran before would so decide what a call costs. Each process here frees such a block first, as a training long has.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from timing import ROUNDS, spread

LARGE = 31 << 20  # bytes; the most from which glibc learns is 32 MiB


class Job(NamedTuple):
    """A measurement: a function of a module, what it is called with, and in how many processes."""

    measure: Callable[..., dict[str, Any]]
    args: tuple[Any, ...]
    processes: int


def measured(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Do all jobs in turn, each time in a fresh process and one at a time; give the results of each, pooled."""
    turns = max(job.processes for job in jobs)
    parts: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for turn in range(turns):
        for job, found in zip(jobs, parts, strict=True):
            if len(found) * turns <= turn * job.processes:  # those with few processes are spread over the turns
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    found.append(fresh.submit(settled, job.measure, *job.args).result())
    return [pooled(found) for found in parts]


def settled(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Call `measure(*args)` in a process whose allocator keeps what is freed."""
    torch.empty(LARGE, dtype=torch.uint8)
    return measure(*args)


def pooled(parts: Sequence[Any]) -> Any:
    """Join results of one shape: a spread is that of all rounds, anything else the first part's."""
    first = parts[0]
    if not isinstance(first, dict):
        return first
    joined = {key: pooled([part[key] for part in parts]) for key in first}
    return joined | spread([value for part in parts for value in part[ROUNDS]]) if ROUNDS in first else joined


def without_rounds(tree: Any) -> Any:
    """Leave the single rounds out: a results file keeps what they come to."""
    return {key: without_rounds(value) for key, value in tree.items() if key != ROUNDS} if isinstance(tree, dict) else tree
