"""Measure in several fresh processes and pool their rounds.

Where a process happens to lay out its memory makes some of its calls faster and others slower for as long as it lives, by more than its
rounds differ among themselves. A spread over the rounds of several processes holds that too, so that another run falls into it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from timing import ROUNDS, spread


def measured(measure: Callable[..., Any], processes: int, *args: Any) -> Any:
    """Call `measure(*args)`, a function of a module, in `processes` fresh processes, one after another; give its results, pooled."""
    parts = []
    for _ in range(processes):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            parts.append(fresh.submit(measure, *args).result())
    return pooled(parts)


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
