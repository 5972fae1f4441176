"""Measure one training step and the call overhead of each variant beside the frozen base and PEFT, and write a results file.

One run, one thread, interleaved rounds: ratios within a round are compared, never times of different runs. The timed step is checked
first: moved params must give a loss and gradients that are finite and not zero.

    python bench/speed.py            # the sizes of the documentation
    python bench/speed.py --quick    # a minute
"""

import argparse
import time
from typing import Any

import torch

import lora_lite as ll
from common import batch_of, interleaved, llama, machine, moved, pairs, peak_bytes, peft_model, ratios, steps, write
from populations import populations


def step_ratios(width: int, layers: int, rows: int, tokens: int, r: int, repeats: int) -> dict[str, Any]:
    """Time a training step of every variant, as a ratio to the frozen base's step and to PEFT's."""
    model, batch = llama(width, layers), batch_of(rows, tokens)
    calls = steps(model, batch, r)
    for name, call in calls.items():
        leaves = torch.utils._pytree.tree_leaves(call())
        if not all(leaf.isfinite().all() for leaf in leaves) or not any(leaf.abs().max() > 0 for leaf in leaves):
            raise SystemExit(f"speed: expected finite gradients that are not all zero from {name}, found others. The step is broken.")
    times = interleaved(calls, repeats)
    base = ratios(times, "frozen")
    beside = {name: ratios(times, f"peft {name}")[name] for name in pairs(r)}
    arithmetic = {}
    for name, (cfg, _) in pairs(r).items():
        adapt = ll.build(model, cfg)
        frozen = sum(t.i * t.o for t in adapt.targets)
        # The frozen step runs each product twice, forward and to the input; the adapter's three times, to its params as well.
        arithmetic[name] = 1 + 1.5 * adapt.macs_per_token / frozen
    sizes = {"width": width, "layers": layers, "rows": rows, "tokens": tokens, "r": r}
    dora = ratios(times, "lora")["dora"]
    return {**sizes, "over_frozen": base, "over_peft": beside, "dora_over_lora": dora, "by_arithmetic": arithmetic}


def overhead(layers: int, repeats: int) -> dict[str, Any]:
    """Time a forward of a tiny, deep model, where calls cost more than arithmetic, and the build on it."""
    model, batch = llama(16, layers, vocab=64).eval(), batch_of(1, 2, vocab=64)
    start = time.perf_counter()
    adapt = ll.build(model, ll.LoRAConfig(r=4))
    seconds = time.perf_counter() - start
    params = moved(adapt.init(seed=0))
    theirs, _ = peft_model(model, pairs(4)["lora"][1])
    with torch.no_grad():
        calls = {"frozen": lambda: model(**batch), "lora": lambda: adapt(params, batch), "peft lora": lambda: theirs(**batch)}
        times = interleaved(calls, repeats)
    return {
        "targets": len(adapt.targets),
        "build_seconds": seconds,
        "over_frozen": ratios(times, "frozen"),
        "over_peft": ratios(times, "peft lora")["lora"],
    }


def memory(width: int, layers: int, rows: int, tokens: int, r: int) -> dict[str, Any]:
    """Give peak bytes of a step: value_and_grad, torch.func.grad, PEFT, and with rematerialised blocks."""
    model, batch = llama(width, layers), batch_of(rows, tokens)
    found = {name: peak_bytes(call) for name, call in steps(model, batch, r).items()}
    cfg = pairs(r)["lora"][0]
    adapt, remat = ll.build(model, cfg).train(), ll.build(model, cfg, remat=r"layers\.\d+$").train()
    params = moved(adapt.init(seed=0))
    found["lora, torch.func.grad"] = peak_bytes(lambda: torch.func.grad(lambda p: adapt(p, batch).loss)(params))
    found["lora, remat"] = peak_bytes(lambda: ll.value_and_grad(lambda p: remat(p, batch).loss)(params))
    return {"width": width, "layers": layers, "rows": rows, "tokens": tokens, "r": r, "peak_bytes": found}


def main() -> None:
    """Run the measurements, print the ratios and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--repeats", type=int, default=30)
    quick = parser.parse_args().quick
    repeats = 5 if quick else parser.parse_args().repeats
    torch.set_num_threads(1)
    width, layers = (128, 2) if quick else (512, 4)
    results: dict[str, Any] = {
        "step": step_ratios(width, layers, rows=4, tokens=64, r=16, repeats=repeats),
        "overhead": overhead(layers=10 if quick else 43, repeats=repeats),
        "memory": memory(128 if quick else 256, 12, rows=8, tokens=64, r=16),
    }
    for name, ratio in results["step"]["over_peft"].items():
        over = results["step"]["over_frozen"][name]["median"]
        print(f"{name:8} {over:.3f} of the frozen step; {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of PEFT's")
    lora, call = results["step"]["dora_over_lora"], results["overhead"]["over_peft"]
    print(f"DoRA {lora['median']:.3f} of LoRA's step; call of {results['overhead']['targets']} targets {call['median']:.3f} of PEFT's")
    print(f"build of {results['overhead']['targets']} targets: {results['overhead']['build_seconds'] * 1e3:.0f} ms")
    torch.set_num_threads(2)
    results["populations"] = populations(width, layers, r=16, repeats=max(3, repeats // 3))
    for name, ratio in results["populations"].items():
        print(f"{name}: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of the loop, two threads")
    for name, size in results["memory"]["peak_bytes"].items():
        print(f"peak {size / 2**20:8.1f} MiB  {name}")
    print(f"wrote {write('quick' if quick else 'cpu', machine(threads=1), results).name}")


if __name__ == "__main__":
    main()
