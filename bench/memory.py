"""Measure the peak memory of each variant's step beside the frozen base's and PEFT's, and write a results file.

Bytes that a call held at once beyond what was held before it: on a CPU from the allocator's own events, on a GPU from its statistics.
These are counted, not sampled, so a second run gives the same numbers.

    python bench/memory.py
    python bench/memory.py --quick
"""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

import lora_lite as ll
from common.contenders import build, contender, forwards, steps
from common.measure import batch_of, device, llama, machine, moved, peak_bytes, sizes_of, write
from common.methods import MEASURED, pairs

SIZES = {
    "quick": {"width": 64, "layers": 1, "rows": 2, "tokens": 32},
    "cpu": {"width": 256, "layers": 8, "rows": 8, "tokens": 64},
    "cuda": {"width": 1024, "layers": 4, "rows": 16, "tokens": 512},
}


def one(job: tuple[str | None, Mapping[str, int], int]) -> dict[str, Any]:
    """Return the peak bytes of a forward pass and of a step of the frozen base, one variant and PEFT's; without a name, LoRA's `ways`."""
    name, sizes, r = job
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    model, batch = llama(sizes["width"], sizes["layers"]), batch_of(sizes["rows"], sizes["tokens"])
    if name is None:
        return ways(model, batch, r)
    c = contender(model, pairs(r)[name], batch)
    forward = {who: peak_bytes(call) for who, call in forwards(model, c, batch).items()}
    return {"forward": forward, "step": {who: peak_bytes(call) for who, call in steps(model, c, batch).items()}}


def memory(sizes: Mapping[str, int], r: int, names: Sequence[str], workers: int) -> dict[str, Any]:
    """Return the peaks of each variant, some at once: they are counted, and the processes do not share what they count."""
    jobs = [(name, sizes, r) for name in (*names, None)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        *rows, lora = tqdm(pool.map(one, jobs), total=len(jobs), desc="memory", mininterval=5)
    return {**sizes, "r": r, "variants": dict(zip(names, rows, strict=True)), "lora": lora}


def ways(model: Any, batch: Mapping[str, Any], r: int) -> dict[str, int]:
    """Return the peak bytes of LoRA's step by each way to its gradient, with blocks recomputed and without."""
    cfg = pairs(r)["lora"].cfg
    adapt, remat = build(model, cfg, ()).train(), ll.build(model, cfg, remat=r"layers\.\d+$").train()
    params = moved(adapt.init(seed=0))
    return {
        "value_and_grad": peak_bytes(lambda: ll.value_and_grad(lambda p: adapt(p, batch).loss)(params)),
        "torch.func.grad": peak_bytes(lambda: torch.func.grad(lambda p: adapt(p, batch).loss)(params)),
        "value_and_grad, remat": peak_bytes(lambda: ll.value_and_grad(lambda p: remat(p, batch).loss)(params)),
        "torch.func.grad, remat": peak_bytes(lambda: torch.func.grad(lambda p: remat(p, batch).loss)(params)),
    }


def main() -> None:
    """Run the measurements, print them and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--width", type=int, help="features")
    parser.add_argument("--layers", type=int, help="blocks")
    parser.add_argument("--workers", type=int, default=2, help="variants at once, a thread each")
    o = parser.parse_args()
    sizes = sizes_of(SIZES, o)
    results = memory(sizes, 8 if o.quick else 16, o.variants, o.workers)
    for name, row in results["variants"].items():
        step = row["step"]
        beside = f"; {step['ours'] / step['peft']:.3f} of PEFT's" if "peft" in step else ""
        print(f"{name:10} {step['ours'] / step['frozen']:.3f} of the frozen step's peak{beside}")
    write("memory", machine(1, where=device()), results, o.quick)


if __name__ == "__main__":
    main()
