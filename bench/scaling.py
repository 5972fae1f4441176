"""Measure how the cost of a step grows with rank, width, batch and number of members, and write a results file.

Each point is a ratio within one run to the frozen base's step on the same model and batch; for members, the time of one mixed step over
the time of as many separate steps.

    python bench/scaling.py --variants lora dora hra oft
    python bench/scaling.py --quick
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lora_lite as ll
from common import batch_of, llama, moved
from contenders import frozen_step
from pairs import MEASURED, build, pairs
from parts import Part, run
from processes import Job
from timing import Spread, interleaved, ratio

TELLING = ("lora", "dora", "hra", "oft")
CENTRE = {"rank": 16, "width": 256, "rows": 4, "members": 4}
POINTS: dict[str, tuple[int, ...]] = {"rank": (4, 16, 64), "width": (128, 256, 512), "rows": (1, 2, 4, 8), "members": (1, 2, 4, 8)}
QUICK: dict[str, tuple[int, ...]] = {"rank": (4, 8), "width": (64, 128), "rows": (1, 2), "members": (1, 2)}


def step_ratio(name: str, at: Mapping[str, int], repeats: int) -> Spread:
    """Give one variant's step over the frozen step."""
    model, batch = llama(at["width"], 2), batch_of(at["rows"], 64)
    adapt = build(model, pairs(at["rank"])[name].cfg, [batch])
    params = moved(adapt.init(seed=0))
    step = ll.value_and_grad(lambda p: adapt(p, batch).loss)
    return ratio(interleaved({"frozen": lambda: frozen_step(model, batch), "ours": lambda: step(params)}, repeats), "ours", "frozen")


def members_ratio(name: str, at: Mapping[str, int], repeats: int) -> Spread:
    """Give the time of one step of many adapters, a row each, over that of a loop over them."""
    model, batch = llama(at["width"], 2), batch_of(at["members"], 32)
    adapt = build(model, pairs(at["rank"])[name].cfg, [batch])
    trees = [moved(adapt.init(seed=k)) for k in range(at["members"])]
    stacked, rows = ll.stack(trees), [{"input_ids": row[None], "use_cache": False} for row in batch["input_ids"]]
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    together = ll.value_and_grad(lambda p: _loss(adapt.mixed(p, inputs), inputs).sum())
    alone = ll.value_and_grad(lambda p, row: _loss(adapt(p, row), row).sum())
    calls = {"mixed": lambda: together(stacked), "loop": lambda: [alone(p, row) for p, row in zip(trees, rows, strict=True)]}
    return ratio(interleaved(calls, repeats), "mixed", "loop")


def _loss(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def scaling(names: Iterable[str], points: Mapping[str, tuple[int, ...]], repeats: int) -> dict[str, Any]:
    """Walk along each axis from the centre: `{axis: {variant: {value: ratio}}}`."""
    measure: dict[str, Callable[..., Spread]] = {axis: members_ratio if axis == "members" else step_ratio for axis in points}
    work = [(axis, name, value) for axis, values in points.items() for name in names for value in values]
    found: dict[str, Any] = {axis: {name: {} for name in names} for axis in points}
    for axis, name, value in tqdm(work, desc="scaling", mininterval=5):
        found[axis][name][str(value)] = measure[axis](name, {**CENTRE, axis: value}, repeats)
    return found


def measure(names: Sequence[str], points: Mapping[str, tuple[int, ...]], repeats: int) -> dict[str, Any]:
    """Do all measurements once, in this process."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    return {"centre": CENTRE, "layers": 2, "tokens": 64, "axes": scaling(names, points, repeats)}


def part(options: Sequence[str] | None = None) -> Part:
    """Read the options, the command line's if not given, and say what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few points and repetitions")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=list(TELLING), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each measurement in each process")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes")
    o = parser.parse_args(options)
    names, points, repeats, processes = (o.variants[:2], QUICK, 3, 1) if o.quick else (o.variants, POINTS, o.repeats, o.processes)
    return Part("scaling", [Job(measure, (names, points, repeats), processes)], show, o.quick)


def show(results: Mapping[str, Any]) -> None:
    """Print the ratios along each axis, a variant a line."""
    for axis, lines in results["axes"].items():
        for name, line in lines.items():
            print(f"{axis:8} {name:8} " + ", ".join(f"{value}: {ratio['median']:.2f}" for value, ratio in line.items()))


if __name__ == "__main__":
    run([part()])
