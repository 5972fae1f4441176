"""Adapt a small language model that has mastered arithmetic to word problems, with every variant, and print the results.

The base, a Llama of 0.87 M parameters shipped in `base/`, solves plain sums and none of the word problems. Each variant trains for a few
hundred steps of `value_and_grad` and AdamW over a plain tree of params. Its adapter is saved, loaded onto a fresh copy of the model and
held against the one in memory; LoRA's is merged too. Train and test problems share neither numbers nor wording.

    python bench/demo.py                        # a telling selection, under ten minutes on two cores
    python bench/demo.py --variants lora vera   # any
    python bench/demo.py --variants all
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import lora_lite as ll
from arithmetic import Row, batch, batches, exact_match, problems
from contenders import frozen_step
from measure import machine, write
from methods import METHODS, demo_config

BASE = Path(__file__).parent / "base"
TELLING = ("lora", "dora", "pissa", "ia3", "ia3_ff")


@dataclass(frozen=True)
class Outcome:
    """The results of a variant: shares in [0, 1], times in seconds."""

    variant: str
    trained: int
    before: float
    after: float
    error: float
    ratio: float
    init: float


def load_base(quantised: bool = False) -> Any:
    """Load the shipped base model, frozen, in evaluation mode; or its linear layers in 4 bits."""
    bits = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")} if quantised else {}
    return transformers.LlamaForCausalLM.from_pretrained(BASE, local_files_only=True, **bits).requires_grad_(False).eval()


def train(
    adapt: ll.Adapt, params: Any, data: list[Row], steps: int, size: int, rate: float, frozen: Callable[[Any], None]
) -> tuple[Any, float]:
    """Train params and give them with the median ratio of a step's time to the frozen step's on the same batch."""
    leaves = ll.tree_leaves(params)
    optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
    warmup = max(min(0.1, 20 / steps), min(1.0, 2 / steps))  # share of the steps, two at the least
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)
    step = ll.value_and_grad(lambda p, rows: adapt(p, rows, use_cache=False).loss)
    ratios, cfg, state = [], adapt.configs[0], None
    bar = tqdm(batches(data, size, steps, seed=0), total=steps, desc=f"{adapt.configs[0].name:7}", mininterval=2)
    for number, rows in enumerate(bar):
        start = time.perf_counter()
        loss, grads = step(params, rows)
        seconds = time.perf_counter() - start
        if number % 10 == min(5, steps - 1):
            start = time.perf_counter()
            frozen(rows)
            ratios.append(seconds / (time.perf_counter() - start))
        ll.set_grads(params, grads)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        schedule.step()
        updated, state = cfg.update(params, grads, state)  # AdaLoRA prunes, AntiPaSTO projects, most do nothing
        with torch.no_grad():
            ll.tree_map(lambda leaf, new: leaf if new is leaf else leaf.copy_(new), params, updated)
        bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    return params, statistics.median(ratios)


def verify(adapt: ll.Adapt, params: Any, rows: dict[str, Any], merge: bool) -> None:
    """Save, load onto a fresh copy and compare to the bit; merge into another and compare to rounding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(adapt, params, path)
        again, read = ll.load(load_base(adapt.configs[0].original), path)
    want = adapt(params, rows).logits
    if not torch.equal(again(read, rows).logits, want):
        raise SystemExit("demo: expected the reloaded adapter to give the same logits, found others.")
    if merge:
        merged = load_base()
        merged.load_state_dict(adapt.merge(params), strict=False)
        off = float((merged(**rows).logits - want).abs().max() / want.abs().max())
        if off > 1e-4:
            raise SystemExit(f"demo: expected the merged model within 1e-4 of the adapted one, found {off:.1e}.")


def run(name: str, model: Any, data: list[Row], test: list[Row], steps: int, size: int, before: float) -> Outcome:
    """Adapt the model with one variant."""
    cfg, rate = demo_config(name, steps), METHODS[name].rate
    original = None
    if cfg.original:  # what starts from the weights before quantisation needs a quantised base
        model, original = load_base(quantised=True), model.state_dict()
    start = time.perf_counter()
    adapt = ll.build(model, cfg, calibration=list(batches(data, size, 8, seed=1)) if cfg.calibrated else None, original=original)
    params = adapt.init(seed=0)
    seconds = time.perf_counter() - start
    if cfg.original:
        before, _ = exact_match(adapt.base, test)  # bitsandbytes may round a model's own scales at its first evaluation
    if cfg.identity == 0.0 and not torch.equal(adapt(params, batch(test[:2])).logits, model(**batch(test[:2])).logits):
        raise SystemExit(f"demo: expected {name} to start at the base model exactly, found another output.")
    params, ratio = train(adapt, params, data, steps, size, rate, lambda rows: frozen_step(model, rows))
    after, error = exact_match(lambda rows: adapt(params, rows), test)
    verify(adapt, params, batch(test[:20]), merge=name == "lora")
    return Outcome(name, adapt.num_params, before, after, error, ratio, seconds)


def table(outcomes: list[Outcome]) -> str:
    """Lay the outcomes out, a variant a line."""
    lines = [f"{'variant':9} {'trained':>8} {'before':>8} {'after':>8} {'± s.e.':>7} {'step/frozen':>12} {'init s':>7}"]
    for o in outcomes:
        numbers = f"{o.trained:>8,} {o.before:>8.1%} {o.after:>8.1%} {o.error:>7.1%} {o.ratio:>12.2f} {o.init:>7.2f}"
        lines.append(f"{o.variant:9} {numbers}")
    return "\n".join(lines)


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=[*METHODS, "all"], default=list(TELLING), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--write", action="store_true", help="write a results file, as the documentation's table needs")
    options = parser.parse_args()
    torch.set_num_threads(2)
    start = time.perf_counter()
    model, data, test = load_base(), problems("train", 6000, seed=0), problems("test", 200, seed=2)
    print("A test problem and its answer:\n ", test[0].question.strip(), "\n ", test[0].answer)
    before, _ = exact_match(lambda rows: model(**rows), test)
    print(f"The frozen base solves {before:.1%} of {len(test)} test problems.", flush=True)
    outcomes = []
    for name in METHODS if "all" in options.variants else options.variants:
        outcomes.append(run(name, model, data, test, options.steps, options.rows, before))
        print(f"{name}: {outcomes[-1].after:.1%} exact; saved, reloaded and verified", flush=True)
    print("\n" + table(outcomes))
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{len(test)} test problems, {options.steps} steps of {options.rows} rows, {minutes:.1f} minutes.")
    if options.write:
        facts = {"steps": options.steps, "rows": options.rows, "test": len(test), "minutes": round(minutes, 2)}
        print("wrote", write("demo", machine(2), {**facts, "outcomes": [vars(o) for o in outcomes]}).name)


if __name__ == "__main__":
    main()
