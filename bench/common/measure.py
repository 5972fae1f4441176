"""Measurement for the benchmarks: models and batches, times in turns, peaks, fresh processes, results files.

Calls are timed in turn, so that a drift of the machine strikes all of them, and compared within each round.

Where a process happens to lay out its memory makes some of its calls faster and others slower for as long as it lives, by more than its
rounds differ among themselves; and over minutes the machine drifts. So each measurement is taken in several processes that lie far apart:
a spread over the rounds of all of them holds both, and another run falls into it.

A new process on Linux gives memory back to the system and asks for it again, page by page, until it has once freed a large block: glibc
then keeps as much. The calls before would so decide the cost of a call. Each process here frees such a block first, as a training long has.
"""

import argparse
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.record import file_name, now, put

RESULTS = Path(__file__).parents[1] / "results"
QUICK = RESULTS / "quick"  # written by --quick: shows that all works, never a figure of the documentation
ROUNDS = "rounds"
LARGE = 31 << 20  # bytes; the most from which glibc learns is 32 MiB

Call = Callable[[], Any]
Times = dict[str, list[float]]
Spread = dict[str, Any]


def device() -> torch.device:
    """Return the device that the benchmarks run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Models and batches


def llama(width: int, layers: int, vocab: int = 512) -> Any:
    """Build a Llama with random frozen weights where the benchmarks run: width in features, eight heads at most."""
    import transformers  # here, since a fresh process that measures something else would import it in vain

    torch.manual_seed(0)
    heads = min(8, width // 8)
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64 or 2 * width, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=vocab, num_attention_heads=heads, num_key_value_heads=heads, **sizes)
    return transformers.LlamaForCausalLM(config).requires_grad_(False).to(device())


def batch_of(rows: int, tokens: int, vocab: int = 512) -> dict[str, Any]:
    """Draw a batch of token ids that are their own labels."""
    ids = torch.randint(vocab, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device())
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def row_losses(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss of each row of a batch of tokens that are their own labels, `(rows,)`."""
    logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def moved(params: dict[str, dict[str, torch.Tensor]], scale: float = 0.01) -> dict[str, dict[str, torch.Tensor]]:
    """Move params off their start, where most variants are the identity."""
    g = torch.Generator().manual_seed(2)
    return {p: {n: t + scale * torch.randn(t.shape, generator=g).to(t) for n, t in leaves.items()} for p, leaves in params.items()}


def sizes_of(table: Mapping[str, Mapping[str, int]], o: argparse.Namespace) -> dict[str, int]:
    """Return the sizes of a run: the table's for `quick` or the sort of device, changed by the options."""
    return {name: getattr(o, name, None) or value for name, value in table["quick" if o.quick else device().type].items()}


# Times and peaks


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
    gc.freeze()  # older objects need not be looked through after every round
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
    """Return the median of values, the bounds of their middle 90 %, their number, and the values themselves."""
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 2
    return {"median": statistics.median(values), "low": cuts[0], "high": cuts[-1], "n": len(values), ROUNDS: values}


def ratio(times: Times, name: str, over: str) -> Spread:
    """Return the ratio of a call's time to another's, round by round."""
    return spread([a / b for a, b in zip(times[name], times[over], strict=True)])


def ratios(times: Times, over: str) -> dict[str, Spread]:
    """Return each call's ratio to `over`, and its time in milliseconds."""
    return {name: {**ratio(times, name, over), "ms": milliseconds(values)} for name, values in times.items()}


def milliseconds(seconds: list[float]) -> Spread:
    """Return the spread of times in milliseconds."""
    return spread([1e3 * value for value in seconds])


def peak_bytes(call: Call) -> int:
    """Return the most bytes that a call held at once beyond those held before it."""
    call()  # caches that stay are not part of the step
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Fresh processes, and the file of what they found


class Job(NamedTuple):
    """A measurement: a function of a module, the arguments of its call, and the number of processes."""

    measure: Callable[..., dict[str, Any]]
    args: tuple[Any, ...]
    processes: int


class Part(NamedTuple):
    """A results file in the making: its kind, its jobs, whose results are joined to one mapping, and a function that prints it."""

    kind: str
    jobs: Sequence[Job]
    show: Callable[[Mapping[str, Any]], None]
    quick: bool


def run(parts: Sequence[Part]) -> None:
    """Do the jobs of all parts in turn, so that those of each lie far apart; print their results and write the results files."""
    found = iter(measured([job for part in parts for job in part.jobs]))
    for part in parts:
        results = {key: value for _ in part.jobs for key, value in next(found).items()}
        part.show(results)
        write(part.kind, machine(1, part.jobs[0].processes, device()), results, part.quick)


def measured(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Do all jobs in turn, each time in a fresh process and one at a time; return the results of each, pooled."""
    turns = max(job.processes for job in jobs)
    parts: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for turn in range(turns):
        for job, found in zip(jobs, parts, strict=True):
            if len(found) * turns <= turn * job.processes:  # those with few processes are spread over the turns
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    found.append(fresh.submit(settled, job.measure, *job.args).result())
    return [pooled(found) for found in parts]


def settled(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Call `measure(*args)` in a process whose allocator keeps freed memory."""
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
    """Leave the single rounds out of a tree of results: a results file keeps their spread."""
    return {key: without_rounds(value) for key, value in tree.items() if key != ROUNDS} if isinstance(tree, dict) else tree


def machine(threads: int, processes: int = 1, where: torch.device | None = None) -> dict[str, Any]:
    """Return the facts that the figures depend on: commit, versions, class of machine, threads, fresh processes that were pooled.

    `where` is the device that was measured, a CPU if not given.
    """
    versions = {m.__name__: m.__version__ for m in map(import_module, ("torch", "transformers", "peft", "lora_lite"))}
    gpu = where is not None and where.type == "cuda"
    kind = torch.cuda.get_device_name(where) if gpu else f"{os.cpu_count()}-core {platform.machine()} CPU"
    counts = {"device": "cuda" if gpu else "cpu", "threads": threads, "processes": processes}
    commit = commit_of(RESULTS.parents[1], "src", ":(glob)bench/**/*.py")
    return {"commit": commit, "versions": versions, "machine": kind, **counts, "python": platform.python_version()}


def commit_of(folder: Path, *measured: str) -> str:
    """Return the short commit of a folder, marked where what was measured has been changed since; "none" where git does not know it.

    Args:
        folder: in a checkout.
        measured: the paths of what was measured, from there, as git takes them.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder, check=False).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + (".changes" if commit and git("status", "--porcelain", "--", *measured) else "") or "none"
    except FileNotFoundError:  # no git here
        return "none"


def write(name: str, facts: dict[str, Any], results: dict[str, Any], quick: bool = False) -> Path:
    """Write a results file, dated and named by commit and kind, on a GPU `<kind>-cuda`, and print its name."""
    date = datetime.date.today().isoformat()
    path = (QUICK if quick else RESULTS) / file_name(date, facts, name)
    put(path, {"date": date, "written": now(), **facts, "results": without_rounds(results)})
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}", flush=True)
    return path
