"""Measure all times: calls, speed, scaling, quantised bases, serving; a fresh process of each in turn, so that their rounds lie far apart.

Calls are this file's own part. A chain of narrow layers shows the price of a call beside its arithmetic: each variant's forward and
gradient step beside PEFT's same method, the base's own call, and the bare products. Starts are `build` and `init` beside PEFT's
`get_peft_model`, for the variants that decompose no weight and see no data.

    python bench/timings.py                  # the sizes of the documentation, about half an hour
    python bench/timings.py --quick          # minutes
    python bench/timings.py --part calls     # one part, with its own results file
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

import lora_lite as ll
import quantised
import scaling
import serving
import speed
from common.contenders import check, peft_model, same_numbers
from common.measure import Call, Job, Part, Times, batch_of, device, interleaved, llama, ratio, run, sizes_of, spread
from common.methods import MEASURED, Pair, config_of, drawn_start, pairs, theirs

SIZES = {
    "quick": {"layers": 20, "width": 16, "rows": 4},
    "cpu": {"layers": 300, "width": 16, "rows": 4},
    "cuda": {"layers": 300, "width": 16, "rows": 4},
}
RANK = 8
CHAIN: dict[str, dict[str, Any]] = {
    "lora": {},
    "ia3": {},
    "vera": {"r": RANK},
    "road": {"group_size": 16},
    "oft": {"block_size": 8},
    "dora": {},
    "adalora": {"init_r": RANK, "target_r": RANK // 2},
    "hra": {},
}
"""The variants on the chain, with the fields that fit its layers."""
Shown = Callable[[Mapping[str, Any]], None]


def chain_of(layers: int, width: int) -> nn.Sequential:
    """Build a frozen chain of square linear layers without bias; orthogonal weights, so that no input fades on the way."""
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for layer in chain:
        nn.init.orthogonal_(layer.weight)
    return chain.to(device()).eval().requires_grad_(False)


def products(base: nn.Sequential, x: Tensor, r: int) -> dict[str, Call]:
    """Return the base's own call, and the bare products of LoRA's layers, of their own factors: two with the fused add, and all three."""
    g = torch.Generator().manual_seed(1)
    shapes = ((r, x.shape[1]), (x.shape[1], r))
    # Small factors, since `three` goes deep.
    layers = [(layer.weight, *(0.01 * torch.randn(shape, generator=g).to(x) for shape in shapes)) for layer in base]

    def two() -> None:
        for _, A, B in layers:
            torch.addmm(x, linear(x, A), B.t(), alpha=2.0)

    def three() -> None:
        y = x
        for weight, A, B in layers:
            y = torch.addmm(linear(y, weight), linear(y, A), B.t(), alpha=2.0)

    return {"base": lambda: base(x), "two products": two, "three products": three}


def beside(name: str, base: nn.Sequential, x: Tensor) -> tuple[ll.Adapt, Any, nn.Module, list[nn.Parameter], dict[str, Any]]:
    """Build a variant and PEFT's same method on the chain, with the same numbers, off their start, and hold their outputs together.

    Raises:
        SystemExit: where the outputs differ, or PEFT's file cannot be read.
    """
    cfg = config_of(name, RANK, **CHAIN[name])
    pair = Pair(cfg, theirs(cfg, [path for path, _ in base.named_children()]))
    model, trained = peft_model(base, pair.peft)
    read = same_numbers(base, pair, model.eval(), trained)
    if read is None:
        raise SystemExit(f"timings: expected PEFT's file of {name} to be read, found that it is not.")
    adapt, params = read
    with torch.no_grad():
        checked = check(name, base(x), adapt(params, x), model(x))
    return adapt, params, model, trained, checked


def chain(sizes: Mapping[str, int], names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Time forward and gradient step of each variant and of PEFT's same method on the chain, in turn."""
    base = chain_of(sizes["layers"], sizes["width"])
    x = torch.randn(sizes["rows"], sizes["width"], generator=torch.Generator().manual_seed(1)).to(device())
    rows: dict[str, Any] = {}
    for name in tqdm(names, desc="chain", mininterval=5):
        adapt, params, model, trained, checked = beside(name, base, x)
        step = ll.value_and_grad(lambda p, adapt=adapt: adapt(p, x).sum())

        def peft_step(model: nn.Module = model, trained: Sequence[nn.Parameter] = trained) -> None:
            for p in trained:
                p.grad = None
            model(x).sum().backward()

        calls = {"ours": lambda adapt=adapt, params=params: adapt(params, x), "peft": lambda model=model: model(x)}
        forward = interleaved({k: torch.no_grad()(call) for k, call in {**calls, **products(base, x, RANK)}.items()}, 3 * repeats, 2)
        steps = interleaved({"ours": lambda step=step, params=params: step(params), "peft": peft_step}, repeats)
        rows[name] = {"checked": checked, "forward": in_layers(forward, sizes["layers"]), "step": in_layers(steps, sizes["layers"])}
        if name == "lora":
            rows[name]["added"] = added(forward)
    return {**sizes, "r": RANK, "variants": rows}


def in_layers(times: Times, layers: int) -> dict[str, Any]:
    """Return the ratio of ours to PEFT's, and the microseconds that each call takes for a layer."""
    return {"over_peft": ratio(times, "ours", "peft"), "us": {k: spread([1e6 * t / layers for t in v]) for k, v in times.items()}}


def added(times: Times) -> dict[str, Any]:
    """Return the time that LoRA adds to the base's own call, over that of its two products and fused add, round by round."""
    return spread([(t - b) / raw for t, b, raw in zip(times["ours"], times["base"], times["two products"], strict=True)])


def starts(width: int, r: int, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Time build and init on the benchmark's Llama of two layers beside PEFT's `get_peft_model`, where both start from drawn numbers."""
    model, batch = llama(width, 2), batch_of(1, 8)
    chosen = {n: pair for n, pair in pairs(r).items() if n in names and pair.peft is not None and drawn_start(pair.peft)}
    found = {n: speed.compared(speed.inits(model, pair, batch, repeats)) for n, pair in tqdm(chosen.items(), desc="starts", mininterval=5)}
    return {"width": width, "layers": 2, "r": r, "variants": found}


ROUNDS = 10
"""Rounds of the chain for each of the starts."""


def measure(sizes: Mapping[str, int], names: Sequence[str], repeats: int, width: int) -> dict[str, Any]:
    """Measure calls and starts once, in this process; `width` is that of the Llama."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    on_chain = [name for name in CHAIN if name in names]
    rounds = ROUNDS * repeats  # of milliseconds each: fewer leave a spread as wide as what is to be told apart
    return {"chain": chain(sizes, on_chain, rounds), "starts": starts(width, 16, names, repeats)}


def part(options: Sequence[str] | None = None) -> Part:
    """Read the options of the calls, and return what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=6, help="rounds of each measurement in each process")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes")
    o = parser.parse_args(options)
    repeats, processes, width = (3, 1, 64) if o.quick else (o.repeats, o.processes, 512)
    return Part("calls", [Job(measure, (sizes_of(SIZES, o), o.variants, repeats, width), processes)], show, o.quick)


def show(results: Mapping[str, Any]) -> None:
    """Print the microseconds a layer and the ratios, a variant a line."""
    for name, row in results["chain"]["variants"].items():
        cells = [
            f"{what} {row[what]['us']['ours']['median']:.1f} / {row[what]['us']['peft']['median']:.1f} us a layer, "
            f"{row[what]['over_peft']['median']:.2f} of PEFT's"
            for what in ("forward", "step")
        ]
        print(f"{name:10} {'; '.join(cells)}" + (f"; {row['added']['median']:.2f} of its products" if "added" in row else ""))
    for name, row in results["starts"]["variants"].items():
        print(f"{name:10} start {row['ms']['ours']['median']:.1f} ms, {row['over_peft']['median']:.2f} of PEFT's")


PARTS: dict[str, Callable[[Sequence[str]], Part]] = {
    "calls": part,
    "speed": speed.part,
    "scaling": scaling.part,
    "quantised": quantised.part,
    "serving": serving.part,
}
"""The timings, by the kind of their results file."""


def main() -> None:
    """Measure all parts, or one with its own options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--part", choices=PARTS, help="this one alone; further options are its own")
    o, own = parser.parse_known_args()
    if own and not o.part:
        parser.error(f"expected options of all parts, found {' '.join(own)}. Name the part that they belong to: --part.")
    quick = ["--quick"] if o.quick else []
    run([PARTS[o.part]([*quick, *own])] if o.part else [make(quick) for make in PARTS.values()])


if __name__ == "__main__":
    main()
