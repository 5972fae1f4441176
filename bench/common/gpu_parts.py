"""The parts of `gpu.py`, each to be run in a process of its own: every figure goes to its results file before the next is measured."""

import argparse
import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from common.record import Record, described

TESTS = Path(__file__).parents[2] / "tests"
QUICK = ("lora", "oft")
"""The variants of a quick run."""
ROUNDS = 5
TRAINING = 14 * 2**30
"""Bytes of a GPU for each training of several at once."""
OWN_CASES = "test_before_any_eager_call"
"""The test that stands in for those of a GPU where there is none."""

Rows = Iterable[tuple[tuple[str, ...], Callable[[], Any]]]


def record_of(out: Path, kind: str) -> Record:
    """Open or continue today's results file of a kind."""
    from common.measure import device, machine  # not above: the tests need neither transformers nor PEFT
    from common.record import file_name

    facts, date = machine(torch.get_num_threads(), where=device()), datetime.date.today().isoformat()
    return Record(out / file_name(date, facts, kind), date, facts)


def each(part: str, out: Path, record: Record, rows: Rows) -> None:
    """Measure the rows that the record lacks, one by one; a failure is noted in `gpu.json` and the next goes on.

    Raises:
        SystemExit: after all rows, where some failed.
    """
    _end(part, failures(part, out, record, rows))


def failures(part: str, out: Path, record: Record, rows: Rows) -> dict[str, str]:
    """Measure the rows that the record lacks, as `each` does, and return the failures, by row."""
    from common.measure import without_rounds

    run, failed = Record(out / "gpu.json"), {}
    run.keep(("failed", part), failed)
    for keys, measure in rows:
        if keys in record:
            continue
        try:
            record.keep(keys, without_rounds(measure()))
            print(f"{part}: {'/'.join(keys)}", flush=True)
        except (Exception, SystemExit) as e:  # SystemExit is how a check of the benchmarks fails
            if e.args == (TOLD,):
                raise
            failed["/".join(keys)] = described(e)
            run.keep(("failed", part), failed)
    return failed


TOLD = "told to end"
"""The message by which `gpu.py` ends a part whose time is over."""


def _end(part: str, failed: dict[str, str]) -> None:
    if failed:
        sys.exit(f"{part}: {len(failed)} failed: {', '.join(failed)}")


def _sizes(table: Any, quick: bool) -> dict[str, int]:
    from common.measure import sizes_of

    return sizes_of(table, argparse.Namespace(quick=quick))


def _names(quick: bool, given: Sequence[str] | None) -> list[str]:
    """Return the variants that are asked for, in the order given; all, or those of a quick run, where none is.

    Raises:
        SystemExit: for a name of no variant that can be measured.
    """
    from common.methods import MEASURED

    if unknown := sorted(set(given or ()) - set(MEASURED)):
        sys.exit(f"gpu: expected names of variants that can be measured, found {', '.join(unknown)}. They are {', '.join(MEASURED)}.")
    return list(given) if given else [name for name in MEASURED if not quick or name in QUICK]


class Outcomes:
    """A plugin of pytest that keeps each test's outcome as it comes."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep an outcome: of the call, or of a set-up that failed or skipped."""
        if report.when == "call" or not report.passed:
            self.record.keep(("outcomes", report.nodeid), report.outcome)


def tests(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Run the tests of a GPU, several at once where pytest-xdist is; without a GPU one other test shows that this works."""
    import pytest

    gpu = torch.cuda.is_available()
    chosen = [str(TESTS / "test_gpu.py")] if gpu else [str(TESTS / "test_compile.py"), "-k", OWN_CASES]
    chosen += ["-k", "lora or oft"] if gpu and quick else []
    workers = min(8, (os.cpu_count() or 2) // 2)
    several = ["-n", str(workers)] if gpu and workers > 1 and find_spec("xdist") else []
    name = torch.cuda.get_device_name() if gpu else "CPU"
    facts = {
        "machine": name,
        "device": "cuda" if gpu else "cpu",
        "torch": torch.__version__,
        "started": datetime.datetime.now().isoformat(),
    }
    record = Record(out / f"gpu-tests{'-cuda' if gpu else ''}.json", datetime.date.today().isoformat(), facts)
    options = ["-q", "--tb=short", *("-p", "no:cacheprovider"), *("-p", "no:benchmark")]
    options += ["--rootdir", str(TESTS.parent), "--device", facts["device"]]
    code = pytest.main([*options, *several, *chosen], plugins=[Outcomes(record)])
    found = list(record.tree["results"].get("outcomes", {}).values())
    if code or not found:
        sys.exit(f"tests: {found.count('failed')} of {len(found)} failed, exit status {int(code)}; see gpu.log")


def steps(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Time forward, step and init of every variant beside the frozen base's and PEFT's."""
    import speed

    measure, facts = speed.measured(_sizes(speed.SIZES, quick), 8 if quick else 16, 3 if quick else ROUNDS)
    record = record_of(out, "speed")
    for key, value in facts.items():
        record.keep(("models", key), value)
    each("steps", out, record, [(("models", "variants", name), lambda n=name: measure(n)) for name in _names(quick, names)])


def compiled(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Compile the steps of every variant, several variants at once, and time them one by one."""
    module = import_module("compiled")
    workers = max(1, (os.cpu_count() or 1) * 3 // 4) if torch.cuda.is_available() else 1
    sizes, r, repeats = _sizes(module.SIZES, quick), 8 if quick else 16, 3 if quick else 3 * ROUNDS
    asked = _names(quick, names)[: 1 if quick and not names else None]
    failed = module.keep(record_of(out, "compiled"), asked, sizes, r, repeats, workers)
    Record(out / "gpu.json").keep(("failed", "compiled"), failed)
    _end("compiled", failed)


def serving(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Time switching, many requests and generation beside PEFT's."""
    module = import_module("serving")
    found = module.measurements(*module.SIZES["quick" if quick else "full"], 2 if quick else ROUNDS)
    order = ("switching", "throughput", "generation", "arrivals")  # the last takes longest
    each("serving", out, record_of(out, "serving"), [((name,), found[name]) for name in order])


def quantised(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Time LoRA's step on quantised bases, and take its peak."""
    module = import_module("quantised")
    sizes, repeats = _sizes(module.SIZES, quick), 2 if quick else ROUNDS
    each("quantised", out, record_of(out, "quantised"), [((b,), lambda b=b: module.compared(b, sizes, 16, repeats)) for b in module.LAYERS])


def memory(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Take the peak of every variant's forward and step, and of the ways to LoRA's gradient."""
    module = import_module("memory")
    sizes, r, record = _sizes(module.SIZES, quick), 8 if quick else 16, record_of(out, "memory")
    for key, value in {**sizes, "r": r}.items():
        record.keep((key,), value)
    found: list[tuple[tuple[str, ...], Any]] = [(("variants", n), lambda n=n: module.one((n, sizes, r))) for n in _names(quick, names)]
    each("memory", out, record, [*found[:1], (("lora",), lambda: module.one((None, sizes, r))), *found[1:]])


def populations(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Time one step of many adapters, and gradients by row, against loops."""
    module = import_module("scaling")
    record, repeats = record_of(out, "speed"), 2 if quick else ROUNDS
    record.keep(("population_threads",), torch.get_num_threads())
    width, layers = (64, 1) if quick else (512, 2)
    each("populations", out, record, [(("populations",), lambda: module.populations(width, layers, r=8 if quick else 16, repeats=repeats))])


def learned(out: Path, quick: bool, names: Sequence[str] | None) -> None:
    """Train every variant on GSM-Symbolic: first the costs of each, alone, then all trainings, several at once.

    A training is kept outside `out`, where `gsm8k.py` keeps its own, and goes on from there.
    """
    from common.measure import device

    module, data = import_module("gsm8k"), import_module("common.gsm8k_data")
    less = {"steps": 2, "rows": 2, "valid": 2, "test": 2, "new_tokens": 4} if quick else {}
    gpu = torch.cuda.is_available()
    bytes_of_all = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    workers = max(1, min((os.cpu_count() or 1) * 3 // 4, bytes_of_all // TRAINING))
    settings = {n: data.published("symbolic", variant=n, dtype="bfloat16" if gpu else "float32", **less) for n in _names(quick, names)}
    record = record_of(out, "symbolic")
    kept = Path("outputs") / "gsm8k"
    first = next(iter(settings.values()))
    loaded = cache(lambda: module.load_model(first, device()))
    rows: list[tuple[tuple[str, ...], Any]] = [(("costs", n), lambda s=s: module.measured(s, *loaded())) for n, s in settings.items()]
    failed = failures("learned", out, record, [(("frozen",), lambda: module.frozen(first, kept)), *rows])
    loaded.cache_clear()
    costs = record.tree["results"].get("costs", {})
    jobs = {n: (s, costs[n]) for n, s in settings.items() if n in costs and ("variants", n) not in record}
    for name, row in module.runs(jobs, kept, workers):
        if "failed" in row:
            failed[name] = row["failed"]
            Record(out / "gpu.json").keep(("failed", "learned"), failed)
        else:
            record.keep(("variants", name), row)
            print(f"learned: {name}", flush=True)
    _end("learned", failed)


PARTS: dict[str, Callable[[Path, bool, Sequence[str] | None], None]] = {
    f.__name__: f for f in (tests, steps, compiled, serving, quantised, memory, populations, learned)
}

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
