"""Compile each variant's steps, time them beside the compiled frozen step and PEFT's, and write a results file, row by row.

Loss, `ll.value_and_grad` of it, and `ll.value_and_grad` of two adapters in one mixed batch, each in one graph by the default back end.
Their gradients are held against eager mode before they are timed. Compilation takes nearly all of the time, so variants are compiled
in processes of their own, `--workers` at once; when all of these have compiled, each is timed in turn, while the others wait.

    python bench/compiled.py                       # every variant: two to three hours on a core, minutes on sixteen
    python bench/compiled.py --variants lora oft   # these; rows that the file of today's commit has already are kept
    python bench/compiled.py --quick --variants lora
"""

import argparse
import datetime
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

import lora_lite as ll
from common.contenders import Contender, contender
from common.measure import (
    QUICK,
    RESULTS,
    Call,
    batch_of,
    device,
    interleaved,
    llama,
    machine,
    milliseconds,
    moved,
    ratio,
    row_losses,
    sizes_of,
    without_rounds,
)
from common.methods import MEASURED, Pair, pairs
from common.record import Record, described, file_name

SIZES = {
    "quick": {"width": 64, "layers": 1, "rows": 2, "tokens": 16},
    "cpu": {"width": 512, "layers": 1, "rows": 4, "tokens": 64},
    "cuda": {"width": 512, "layers": 1, "rows": 32, "tokens": 512},
}
ADAPTERS = 2
OVER = {"ours": ("frozen", "peft", "eager"), "value_and_grad": ("frozen", "eager"), "mixed": ("frozen", "mixed eager")}
"""Each compiled step of ours, and what its time is divided by."""


def compiled(model: Any, pair: Pair, batch: dict[str, Any]) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """Return the calls, compiled, the seconds that each took to compile, and why PEFT's could not be, if so.

    Gradients of ours are checked against eager mode, where that has the same ones each time.

    Raises:
        SystemExit: where a compiled step has other gradients than eager mode.
    """
    torch.compiler.reset()
    c = contender(model, pair, batch)
    rows = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    base = _compile(lambda rows: model(inputs_embeds=rows, labels=batch["labels"], use_cache=False).loss)
    loss = _compile(lambda p: c.adapt(p, batch).loss, fullgraph=True)
    leaves = {path: {n: t.detach().clone().requires_grad_() for n, t in tree.items()} for path, tree in c.params.items()}
    eager = ll.value_and_grad(lambda p: c.adapt(p, batch).loss)
    step = _compile(eager, fullgraph=True)
    calls: dict[str, Call] = {
        "frozen": lambda: torch.autograd.grad(base(rows), rows),
        "ours": lambda: torch.autograd.grad(loss(leaves), ll.tree_leaves(leaves)),
        "eager": lambda: ll.tree_leaves(eager(c.params)[1]),
        "value_and_grad": lambda: ll.tree_leaves(step(c.params)[1]),
    }
    if c.theirs is not None:
        theirs = _compile(lambda: c.theirs(**batch).loss)
        calls["peft"] = lambda: torch.autograd.grad(theirs(), list(c.trained), allow_unused=True)
    calls |= mixed(c, pair, batch)
    seconds, found, failed = {}, {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            found[name] = call()
        except Exception as e:
            if name != "peft":
                raise
            failed[name] = described(e)
        seconds[name] = time.perf_counter() - start
    for name, want in {"ours": "eager", "value_and_grad": "eager", "mixed": "mixed eager"}.items():
        if name in found and not _draws(calls[want]):
            _check(pair.cfg.name, name, found[name], found[want])
    return {name: call for name, call in calls.items() if name in found}, seconds, failed


def _draws(call: Call) -> bool:
    """Whether a call has other results each time, of noise that compiled code draws otherwise."""
    return any(not torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


def mixed(c: Contender, pair: Pair, batch: dict[str, Any]) -> dict[str, Call]:
    """Return a step of two adapters in one batch, compiled and not; nothing for a variant whose module has no rows to mix."""
    if pair.cfg.adapts == "module":
        return {}
    index = torch.arange(len(batch["input_ids"]), device=device()) % ADAPTERS
    stacked = ll.stack([moved(c.params, 0.01 * k) for k in range(ADAPTERS)])
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    eager = ll.value_and_grad(lambda p: row_losses(c.adapt.mixed(p, inputs, index), inputs).mean())
    step = _compile(eager, fullgraph=True)
    return {"mixed": lambda: ll.tree_leaves(step(stacked)[1]), "mixed eager": lambda: ll.tree_leaves(eager(stacked)[1])}


def _compile(f: Call, fullgraph: bool = False) -> Call:
    """Compile for the shapes of the first call: else the graph of several adapters would be one for any number of axes' sizes."""
    return torch.compile(f, fullgraph=fullgraph, dynamic=False)


def _check(variant: str, name: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        if not torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()) + 1e-7):
            raise SystemExit(f"bench: expected the compiled step of {variant} ({name}) to give the eager gradients, found others.")


def timed(calls: Mapping[str, Call], seconds: Mapping[str, float], repeats: int) -> dict[str, Any]:
    """Return the ratios of one variant's compiled steps, their milliseconds, and the seconds of compilation."""
    times = interleaved(calls, repeats)
    found: dict[str, Any] = {}
    for name, others in OVER.items():
        if name in times:
            part = {f"over_{other.split()[-1]}": ratio(times, name, other) for other in others if other in times}
            found |= part if name == "ours" else {name: part}
    return {**found, "ms": {name: milliseconds(values) for name, values in times.items()}, "compile_seconds": dict(seconds)}


def _alone(pipe: Connection, name: str, sizes: Mapping[str, int], r: int, repeats: int) -> None:
    """Compile one variant in this process, say so, and time it when told to; send the error where one struck."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    try:
        model, batch = llama(sizes["width"], sizes["layers"]), batch_of(sizes["rows"], sizes["tokens"])
        calls, seconds, failed = compiled(model, pairs(r)[name], batch)
        pipe.send(None)
        pipe.recv()
        pipe.send({**without_rounds(timed(calls, seconds, repeats)), **{f"{who}_failed": why for who, why in failed.items()}})
    except (Exception, SystemExit) as e:  # whatever it is, the other variants go on
        pipe.send({"failed": described(e)})


def rows(names: Sequence[str], sizes: Mapping[str, int], r: int, repeats: int, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compile `workers` variants at once and time them one by one: each name with its row, or with the error as `{"failed": ...}`."""
    spawn = get_context("spawn")
    for start in range(0, len(names), workers):
        wave = []
        for name in names[start : start + workers]:
            ours, its = spawn.Pipe()
            process = spawn.Process(target=_alone, args=(its, name, sizes, r, repeats), daemon=True)
            process.start()
            its.close()  # so that the end of the process is the end of the pipe
            wave.append((name, ours, process))
        first = [_answer(pipe) for _, pipe, _ in wave]
        for (name, pipe, process), failed in zip(wave, first, strict=True):
            if failed is None:
                pipe.send("time it")
            yield name, failed or _answer(pipe)
            process.join()


def _answer(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return {"failed": "the process ended without an answer"}


def keep(record: Record, names: Sequence[str], sizes: Mapping[str, int], r: int, repeats: int, workers: int) -> dict[str, str]:
    """Measure the rows that the record lacks, adding each as it comes; return the failures, by variant."""
    for key, value in {**sizes, "r": r, "adapters": ADAPTERS}.items():
        record.keep((key,), value)
    failed = {}
    lacking = [name for name in names if ("variants", name) not in record]
    for name, row in rows(lacking, sizes, r, repeats, workers):
        if "failed" in row:
            failed[name] = row["failed"]
            print(f"{name:10} failed: {row['failed']}", flush=True)
        else:
            record.keep(("variants", name), row)
            line = ", ".join(f"{key.removeprefix('over_')} {row[key]['median']:.2f}" for key in row if key.startswith("over_"))
            print(f"{name:10} step over {line}; {sum(row['compile_seconds'].values()):.0f} s of compilation", flush=True)
    return failed


def measure(names: Sequence[str], quick: bool, repeats: int | None = None, workers: int = 1) -> dict[str, str]:
    """Write or continue today's file of these variants; return the failures, by variant."""
    sizes, r = sizes_of(SIZES, argparse.Namespace(quick=quick)), 8 if quick else 16
    facts, date = machine(1, where=device()), datetime.date.today().isoformat()
    record = Record((QUICK if quick else RESULTS) / file_name(date, facts, "compiled"), date, facts)
    failed = keep(record, names, sizes, r, repeats or (3 if quick else 15), workers)
    print(f"wrote {record.path.relative_to(RESULTS.parent.parent)}")
    return failed


def main(options: Sequence[str] | None = None) -> None:
    """Compile and time the variants that are asked for; end with an error where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--repeats", type=int, help="rounds of each measurement")
    parser.add_argument("--workers", type=int, default=1, help="variants that are compiled at once, a process each")
    o = parser.parse_args(options)
    failed = measure(o.variants, o.quick, o.repeats, o.workers)
    if failed:
        raise SystemExit(f"compiled: {len(failed)} of {len(o.variants)} variants failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
