"""Time calls in turn, so that what drifts drifts for all of them, and compare within each round."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
Times = dict[str, list[float]]
Spread = dict[str, Any]
ROUNDS = "rounds"


def device() -> torch.device:
    """Give the device that the benchmarks run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call: Call, where: torch.device) -> float:
    """Time one call: by the clock on a CPU, by events on a GPU, whose work runs on after the call has returned."""
    if where.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(where):
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3  # milliseconds


def interleaved(calls: Mapping[str, Call], repeats: int, warmup: int = 1, where: torch.device | None = None) -> Times:
    """Time every call once a round, for `repeats` rounds: seconds, in order.

    Each round starts with another call, since a call runs faster after one that leaves its weights in the cache. The collector
    of garbage waits between rounds: within one it would strike some calls and not others.
    """
    where = where or device()
    times: Times = {name: [] for name in calls}
    order, collects = list(calls), gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be looked through after every round
    try:
        for round_ in range(warmup + repeats):
            gc.collect()
            for name in order:
                took = seconds(calls[name], where)
                if round_ >= warmup:
                    times[name].append(took)
            order = order[1:] + order[:1]
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return times


def spread(values: list[float]) -> Spread:
    """Give the median of values, between what bounds the middle 90 % of them lie, how many there are, and the values themselves."""
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 2
    return {"median": statistics.median(values), "low": cuts[0], "high": cuts[-1], "n": len(values), ROUNDS: values}


def ratio(times: Times, name: str, over: str) -> Spread:
    """Give the ratio of a call's time to another's, round by round."""
    return spread([a / b for a, b in zip(times[name], times[over], strict=True)])


def ratios(times: Times, over: str) -> dict[str, Spread]:
    """Give each call's ratio to `over`, and its time in milliseconds."""
    return {name: {**ratio(times, name, over), "ms": milliseconds(values)} for name, values in times.items()}


def milliseconds(seconds: list[float]) -> Spread:
    """Give the spread of times in milliseconds."""
    return spread([1e3 * value for value in seconds])
