"""Measure each variant's time beside the frozen base, PEFT's same method and its own arithmetic, and write a results file.

Forward, training step and init on a Llama; the pure functions by themselves; many adapters in one batch. Ratios are taken within rounds
of one run, never between runs. Outputs are checked before they are timed. With `--compiled` the compiled steps instead, see `compiled.py`.

    python bench/speed.py                            # the sizes of the documentation
    python bench/speed.py --quick                    # a minute
    python bench/speed.py --variants lora oft --width 1024 --layers 8
    python bench/speed.py --compiled all             # two to three hours on a core; what today's file has already is kept
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import compiled
import lora_lite as ll
from common.contenders import Contender, build, contender, forwards, steps, wrapped
from common.measure import Call, Job, Part, Times, batch_of, device, interleaved, llama, milliseconds, moved, ratio, run, sizes_of
from common.methods import MEASURED, Pair, pairs, rank
from scaling import populations

SIZES = {
    "quick": {"width": 64, "layers": 1, "rows": 2, "tokens": 32},
    "cpu": {"width": 512, "layers": 2, "rows": 4, "tokens": 64},
    "cuda": {"width": 512, "layers": 2, "rows": 32, "tokens": 1024},  # enough arithmetic for the calls of kernels to hide behind
}


def compared(times: Times) -> dict[str, Any]:
    """Return the ratios of ours, and of PEFT's where it takes part, with the times in milliseconds."""
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
    measure_one, facts = measured(sizes, r, repeats)
    return {**facts, "variants": {name: measure_one(name) for name in tqdm(list(names), desc="forward, step, init", mininterval=5)}}


def measured(sizes: Mapping[str, int], r: int, repeats: int) -> tuple[Callable[[str], dict[str, Any]], dict[str, Any]]:
    """Build the models of the sizes; return a function that times forward, step and init of a variant, and the facts of all rows."""
    model, block, batch = llama(sizes["width"], sizes["layers"]), llama(sizes["width"], 1), batch_of(sizes["rows"], sizes["tokens"])
    frozen = macs_per_token(model, batch)

    def one(name: str) -> dict[str, Any]:
        pair = pairs(r)[name]
        c = contender(model, pair, batch)
        added = c.adapt.macs_per_token / frozen
        forward = compared(interleaved(forwards(model, c, batch), repeats))
        step = compared(interleaved(steps(model, c, batch), repeats))
        return {
            **counts(pair, c),
            "forward": {**forward, "by_arithmetic": 1 + added},
            # The frozen step runs each product twice, forward and to the input; the adapter's three times, to its params as well.
            "step": {**step, "by_arithmetic": 1 + 1.5 * added},
            "init": compared(inits(block, pair, batch, 3)),
        }

    return one, {**sizes, "r": r, "frozen_macs_per_token": frozen, "device": str(device())}


def counts(pair: Pair, c: Contender) -> dict[str, Any]:
    """Return the facts of a variant: its rank, the numbers it trains, the multiply-adds it adds, and the check of its output."""
    found = {"r": rank(pair.cfg), "params": c.adapt.num_params, "macs_per_token": c.adapt.macs_per_token, "checked": c.checked}
    return found | ({"params_peft": sum(t.numel() for t in c.trained)} if c.theirs is not None else {})


def inits(block: nn.Module, pair: Pair, batch: Mapping[str, Any], repeats: int) -> Times:
    """Time build and init on a model of one block, calibration included, and PEFT's on copies made beforehand."""
    calls: dict[str, Any] = {"ours": lambda: build(block, pair.cfg, [batch]).init(seed=0)}
    if pair.peft is not None:
        copies = [copy.deepcopy(block) for _ in range(repeats + 1)]  # PEFT changes the model that it adapts
        calls["peft"] = lambda: wrapped(copies.pop(), copy.deepcopy(pair.peft), [batch])
    return interleaved(calls, repeats, warmup=1)


def costs(sizes: Mapping[str, int], r: int, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure the variants on models, once, in this process."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    return {"models": models(sizes, r, names, repeats)}


def calls(sizes: Mapping[str, int], r: int, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure once, in this process: the pure functions, and many adapters in one batch."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    found = {"functions": functions(sizes["width"], 64, r, names, 3 * repeats)}
    torch.set_num_threads(2)
    return {**found, "population_threads": 2, "populations": populations(sizes["width"], sizes["layers"], r=r, repeats=repeats)}


def part(options: Sequence[str] | None = None) -> Part:
    """Read the options, the command line's if not given, and say what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small sizes")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--repeats", type=int, help="rounds of each measurement in each process")
    parser.add_argument("--processes", type=int, help="fresh processes; what takes little time is measured in twice as many")
    for size, meaning in {"width": "features", "layers": "blocks", "rows": "of a batch", "tokens": "of a row", "rank": "of LoRA"}.items():
        parser.add_argument(f"--{size}", type=int, help=meaning)
    o = parser.parse_args(options)
    sizes = sizes_of(SIZES, o)
    r, repeats, processes = o.rank or (8 if o.quick else 16), o.repeats or (3 if o.quick else 5), o.processes or (1 if o.quick else 3)
    jobs = [
        Job(costs, (sizes, r, o.variants, repeats), processes),
        Job(calls, (sizes, r, o.variants, max(2, repeats - 1)), 1 if o.quick else 2 * processes),
    ]
    return Part("speed", jobs, show, o.quick)


def show(results: Mapping[str, Any]) -> None:
    """Print the ratios of a step, a line each."""
    for name, row in results["models"]["variants"].items():
        over, beside = row["step"]["over_frozen"]["median"], row["step"].get("over_peft")
        peft = f"; {beside['median']:.3f} [{beside['low']:.3f}, {beside['high']:.3f}] of PEFT's" if beside else ""
        print(f"{name:10} {over:.3f} of the frozen step, {row['step']['by_arithmetic']:.3f} by arithmetic{peft}")


MEMBERS = 8


class OneLayer(nn.Module):
    """A model of one linear layer, with a loss for the variants that start from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = self.layer(x)
        return SimpleNamespace(logits=logits, loss=logits.square().mean())


def functions(width: int, tokens: int, r: int, names: Iterable[str], repeats: int) -> dict[str, Any]:
    """Time each variant's function of one layer as a ratio to the frozen layer's, and its `vmap` over members to a loop over them."""
    model, rows = OneLayer(width).to(device()), {}
    x = torch.randn(MEMBERS, tokens, width, generator=torch.Generator().manual_seed(1)).to(device())
    for name in tqdm(list(names), desc="functions", mininterval=5):
        cfg = pairs(r)[name].cfg
        try:
            adapt = build(model, cfg, [{"x": x[0]}])
        except ValueError as e:
            rows[name] = {"left_out": str(e).partition("\n")[0][:120]}  # no function of a linear layer, as with norms
            continue
        params = moved(adapt.init(seed=0))
        if list(params) != ["layer"]:
            rows[name] = {"left_out": "it acts on no linear layer"}
            continue
        constants = {**adapt.constants.get(cfg.name, {}), **adapt.constants["layer"]}
        rows[name] = _times(cfg, params["layer"], ll.Frozen(model.layer.weight, model.layer.bias, constants), x, repeats)
    return {"width": width, "tokens": tokens, "members": MEMBERS, "variants": rows}


def _times(cfg: ll.AdapterConfig, params: Mapping[str, Tensor], W: ll.Frozen, x: Tensor, repeats: int) -> dict[str, Any]:
    stacked = {name: torch.stack([p + 0.01 * k for k in range(len(x))]) for name, p in params.items()}
    members = [{name: p[k] for name, p in stacked.items()} for k in range(len(x))]
    together, one = torch.vmap(lambda p, x: cfg.forward(p, W, x)), x[0]
    grad = torch.func.grad(lambda p, x: cfg.forward(p, W, x).square().mean())

    def loop() -> Tensor:
        return torch.stack([cfg.forward(p, W, row) for p, row in zip(members, x, strict=True)])

    if not torch.allclose(together(stacked, x), loop(), rtol=1e-3, atol=1e-4):
        raise SystemExit(f"bench: expected vmap of {cfg.name} to equal a loop, found others.")
    calls: dict[str, Call] = {
        "frozen": lambda: W(one),
        "forward": lambda: cfg.forward(params, W, one),
        "frozen grad": lambda: torch.func.grad(lambda x: W(x).square().mean())(one),
        "grad": lambda: grad(params, one),
        "loop": loop,
        "vmap": lambda: together(stacked, x),
        "grads in a loop": lambda: [grad(p, row) for p, row in zip(members, x, strict=True)],
        "vmap of grad": lambda: torch.vmap(grad)(stacked, x),
    }
    times = interleaved(calls, repeats, warmup=3)
    over = {"forward": "frozen", "grad": "frozen grad", "vmap": "loop", "vmap of grad": "grads in a loop"}
    return {name: ratio(times, name, beside) for name, beside in over.items()}


def main() -> None:
    """Measure by `part`; with `--compiled` the compiled steps of the variants that follow it, all of them or some."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--compiled", nargs="+", choices=[*MEASURED, "all"], metavar="NAME")
    o, others = parser.parse_known_args()
    if o.compiled is None:
        run([part()])
    else:
        compiled.main(["--variants", *(MEASURED if "all" in o.compiled else o.compiled), *others])


if __name__ == "__main__":
    main()
