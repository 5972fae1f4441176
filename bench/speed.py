"""Measure what each variant costs in time beside the frozen base, PEFT's same method and its own arithmetic, and write a results file.

Forward, training step and init on a Llama; the same compiled; the pure functions by themselves; calls of a deep and tiny model; many
adapters in one batch. Ratios are taken within rounds of one run, never between runs. What is timed is checked first.

    python bench/speed.py                            # the sizes of the documentation
    python bench/speed.py --quick                    # a minute
    python bench/speed.py --variants lora oft --width 1024 --layers 8
"""

import argparse
import copy
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import lora_lite as ll
from common import batch_of, llama, moved, sizes_of
from compiled import compiled
from contenders import Contender, contender, forwards, steps
from functions import functions
from pairs import MEASURED, Pair, build, pairs, peft_model, rank, wrapped
from parts import Part, run
from populations import populations
from processes import Job
from timing import Times, device, interleaved, milliseconds, ratio, ratios

SIZES = {
    "quick": {"width": 64, "layers": 1, "rows": 2, "tokens": 32},
    "cpu": {"width": 512, "layers": 2, "rows": 4, "tokens": 64},
    "cuda": {"width": 512, "layers": 2, "rows": 32, "tokens": 1024},  # enough arithmetic for the calls of kernels to hide behind
}


def compared(times: Times) -> dict[str, Any]:
    """Give the ratios of ours, and of PEFT's where it takes part, with the times in milliseconds."""
    found: dict[str, Any] = {"ms": {name: milliseconds(values) for name, values in times.items()}}
    if "frozen" in times:
        found["over_frozen"] = ratio(times, "ours", "frozen")
    if "peft" in times:
        found["over_peft"] = ratio(times, "ours", "peft")
        found |= {"peft_over_frozen": ratio(times, "peft", "frozen")} if "frozen" in times else {}
    return found


def macs_per_token(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Count the frozen model's multiply-adds for one token."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops() / 2 / batch["input_ids"].numel()


def models(sizes: Mapping[str, int], r: int, names: Iterable[str], repeats: int) -> dict[str, Any]:
    """Time forward, step and init of each variant on a Llama of the sizes."""
    model, block, batch = llama(sizes["width"], sizes["layers"]), llama(sizes["width"], 1), batch_of(sizes["rows"], sizes["tokens"])
    frozen, rows = macs_per_token(model, batch), {}
    for name in tqdm(list(names), desc="forward, step, init", mininterval=5):
        pair = pairs(r)[name]
        c = contender(model, pair, batch)
        added = c.adapt.macs_per_token / frozen
        forward = compared(interleaved(forwards(model, c, batch), repeats))
        step = compared(interleaved(steps(model, c, batch), repeats))
        rows[name] = {
            **counts(pair, c),
            "forward": {**forward, "by_arithmetic": 1 + added},
            # The frozen step runs each product twice, forward and to the input; the adapter's three times, to its params as well.
            "step": {**step, "by_arithmetic": 1 + 1.5 * added},
            "init": compared(inits(block, pair, batch, 3)),
        }
    return {**sizes, "r": r, "frozen_macs_per_token": frozen, "device": str(device()), "variants": rows}


def counts(pair: Pair, c: Contender) -> dict[str, Any]:
    """Say what a variant is: its rank, what it trains, what it adds, and how its output was checked."""
    found = {"r": rank(pair.cfg), "params": c.adapt.num_params, "macs_per_token": c.adapt.macs_per_token, "checked": c.checked}
    return found | ({"params_peft": sum(t.numel() for t in c.trained)} if c.theirs is not None else {})


def inits(block: nn.Module, pair: Pair, batch: Mapping[str, Any], repeats: int) -> Times:
    """Time build and init on a model of one block, calibration included, and PEFT's on copies made beforehand."""
    calls: dict[str, Any] = {"ours": lambda: build(block, pair.cfg, [batch]).init(seed=0)}
    if pair.peft is not None:
        copies = [copy.deepcopy(block) for _ in range(repeats + 1)]  # PEFT changes the model that it adapts
        calls["peft"] = lambda: wrapped(copies.pop(), copy.deepcopy(pair.peft), [batch])
    return interleaved(calls, repeats, warmup=1)


def overhead(layers: int, repeats: int) -> dict[str, Any]:
    """Time a forward of a tiny, deep model, where calls cost more than arithmetic, and the build on it."""
    model, batch = llama(16, layers, vocab=64).eval(), batch_of(1, 2, vocab=64)
    start = time.perf_counter()
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    seconds = time.perf_counter() - start
    params = moved(adapt.init(seed=0))
    theirs, _ = peft_model(model, pairs(4)["lora"].peft)
    with torch.no_grad():
        calls = {"frozen": lambda: model(**batch), "ours": lambda: adapt(params, batch), "peft": lambda: theirs(**batch)}
        times = interleaved(calls, repeats)
    found = {"over_frozen": ratios(times, "frozen"), "over_peft": ratio(times, "ours", "peft")}
    return {"targets": len(adapt.targets), "build_seconds": seconds, **found}


def costs(sizes: Mapping[str, int], r: int, names: Sequence[str], chosen: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure the variants on models, once, in this process; `chosen` are compiled too."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    return {"models": models(sizes, r, names, repeats), "compiled": compiled(sizes["width"], r, chosen, repeats)}


def calls(sizes: Mapping[str, int], r: int, names: Sequence[str], repeats: int, blocks: int) -> dict[str, Any]:
    """Measure what takes little time, once, in this process; `blocks` is the depth of the model whose calls are timed."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    found = {"functions": functions(sizes["width"], 64, r, names, 3 * repeats), "overhead": overhead(blocks, 2 * repeats)}
    torch.set_num_threads(2)
    return {**found, "populations": populations(sizes["width"], sizes["layers"], r=r, repeats=repeats)}


def part(options: Sequence[str] | None = None) -> Part:
    """Read the options, the command line's if not given, and say what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--compiled", nargs="*", choices=MEASURED, default=None, metavar="NAME", help="which to compile")
    parser.add_argument("--repeats", type=int, help="rounds of each measurement in each process")
    parser.add_argument("--processes", type=int, help="fresh processes; what takes little time is measured in twice as many")
    for size, meaning in {"width": "features", "layers": "blocks", "rows": "of a batch", "tokens": "of a row", "rank": "of LoRA"}.items():
        parser.add_argument(f"--{size}", type=int, help=meaning)
    o = parser.parse_args(options)
    sizes = sizes_of(SIZES, o)
    r, repeats, processes = o.rank or (8 if o.quick else 16), o.repeats or (3 if o.quick else 5), o.processes or (1 if o.quick else 3)
    chosen = o.compiled if o.compiled is not None else [n for n in (("lora",) if o.quick else ("lora", "dora")) if n in o.variants]
    jobs = [
        Job(costs, (sizes, r, o.variants, chosen, repeats), processes),
        Job(calls, (sizes, r, o.variants, max(2, repeats - 1), 4 if o.quick else 43), 1 if o.quick else 2 * processes),
    ]
    return Part("speed", jobs, show, o.quick)


def show(results: Mapping[str, Any]) -> None:
    """Print the ratios of a step, a line each."""
    for name, row in results["models"]["variants"].items():
        over, beside = row["step"]["over_frozen"]["median"], row["step"].get("over_peft")
        peft = f"; {beside['median']:.3f} [{beside['low']:.3f}, {beside['high']:.3f}] of PEFT's" if beside else ""
        print(f"{name:10} {over:.3f} of the frozen step, {row['step']['by_arithmetic']:.3f} by arithmetic{peft}")


if __name__ == "__main__":
    run([part()])
