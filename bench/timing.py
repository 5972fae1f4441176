"""Time calls in turn, so that what drifts drifts for all of them, and compare within each round."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
Times = dict[str, list[float]]
Ratio = dict[str, float]


def seconds(call: Call, device: torch.device) -> float:
    """Time one call: by the clock on a CPU, by events on a GPU, whose work runs on after the call has returned."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3  # milliseconds


def interleaved(calls: Mapping[str, Call], repeats: int, warmup: int = 2, device: torch.device | None = None) -> Times:
    """Time every call once a round, for `repeats` rounds: seconds, in order.

    Each round starts with another call, since a call runs faster after one that leaves its weights in the cache. The collector
    of garbage waits between rounds: within one it would strike some calls and not others.
    """
    device = device or torch.device("cpu")
    times: Times = {name: [] for name in calls}
    order, collects = list(calls), gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be looked through after every round
    try:
        for round_ in range(warmup + repeats):
            gc.collect()
            for name in order:
                took = seconds(calls[name], device)
                if round_ >= warmup:
                    times[name].append(took)
            order = order[1:] + order[:1]
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return times


def spread(values: list[float]) -> Ratio:
    """Give the median and the quartiles of values, and how many there are."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high, "n": len(values)}


def ratio(times: Times, name: str, over: str) -> Ratio:
    """Give the ratio of a call's time to another's, round by round."""
    return spread([a / b for a, b in zip(times[name], times[over], strict=True)])


def ratios(times: Times, over: str) -> dict[str, Ratio]:
    """Give each call's ratio to `over`, and its median time in milliseconds."""
    return {name: {**ratio(times, name, over), "ms": statistics.median(values) * 1e3} for name, values in times.items()}
