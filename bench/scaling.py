"""Measure how the cost of a step grows with rank, width, batch, members and their rows, and write a results file.

Each point is a ratio within one run to the frozen base's step on the same model and batch; for members, and for the rows of each, the time
of one mixed step over the time of as many separate steps.

    python bench/scaling.py --variants lora dora hra oft
    python bench/scaling.py --quick
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

import lora_lite as ll
from common.contenders import build, frozen_step
from common.measure import Job, Part, Spread, batch_of, interleaved, llama, moved, peak_bytes, ratio, ratios, row_losses, run
from common.methods import MEASURED, pairs

TELLING = ("lora", "dora", "hra", "oft")
CENTRE = {"rank": 16, "width": 256, "rows": 4, "members": 4, "each": 1}
"""`each` is the rows of each member, where many adapters are one step."""
POINTS: dict[str, tuple[int, ...]] = {
    **{"rank": (4, 16, 64), "width": (128, 256, 512), "rows": (1, 2, 4, 8)},
    **{"members": (1, 2, 4, 8, 16), "each": (1, 2, 8, 32), "few": (2, 8, 32, 64)},
}
QUICK: dict[str, tuple[int, ...]] = {"rank": (4, 8), "width": (64, 128), "rows": (1, 2), "members": (1, 2), "each": (1, 2), "few": (2, 4)}
MANY = ("members", "each", "few")
"""The axes on which one step of many adapters is timed over a loop."""
FROZEN = "frozen base"
"""The line of the base alone on those."""
TOKENS = 64
MEMBER_TOKENS = 32
FEW_TOKENS = 16
"""The tokens of a member's one row on the axis `few`, of many members with little to do each."""


def step_ratio(name: str, at: Mapping[str, int], repeats: int) -> Spread:
    """Return one variant's step over the frozen step."""
    model, batch = llama(at["width"], 2), batch_of(at["rows"], TOKENS)
    adapt = build(model, pairs(at["rank"])[name].cfg, [batch])
    params = moved(adapt.init(seed=0))
    step = ll.value_and_grad(lambda p: adapt(p, batch).loss)
    return ratio(interleaved({"frozen": lambda: frozen_step(model, batch), "ours": lambda: step(params)}, repeats), "ours", "frozen")


def members_ratio(name: str, at: Mapping[str, int], repeats: int) -> Spread:
    """Return the time of one step of many adapters, each with as many rows, over that of a loop over them.

    For the frozen base it is forward and backward to its input: the ratio of a mixed step whose adapters cost nothing.
    """
    members, each, tokens = (at["few"], 1, FEW_TOKENS) if "few" in at else (at["members"], at["each"], MEMBER_TOKENS)
    model, ids = llama(at["width"], 2), batch_of(members * each, tokens)["input_ids"]
    if name == FROZEN:
        whole, *alone = [{"input_ids": rows, "labels": rows} for rows in (ids, *ids.chunk(members))]
        frozen = {"mixed": lambda: frozen_step(model, whole), "loop": lambda: [frozen_step(model, part) for part in alone]}
        return ratio(interleaved(frozen, repeats), "mixed", "loop")
    adapt = build(model, pairs(at["rank"])[name].cfg, [batch_of(members, MEMBER_TOKENS)])
    trees = [moved(adapt.init(seed=k)) for k in range(members)]
    stacked, inputs = ll.stack(trees), {"input_ids": ids, "use_cache": False}
    parts = [{"input_ids": part, "use_cache": False} for part in ids.chunk(members)]
    together = ll.value_and_grad(lambda p: row_losses(adapt.mixed(p, inputs), inputs).sum())
    alone = ll.value_and_grad(lambda p, part: row_losses(adapt(p, part), part).sum())
    calls = {"mixed": lambda: together(stacked), "loop": lambda: [alone(p, part) for p, part in zip(trees, parts, strict=True)]}
    return ratio(interleaved(calls, repeats), "mixed", "loop")


def scaling(names: Iterable[str], points: Mapping[str, tuple[int, ...]], repeats: int) -> dict[str, Any]:
    """Walk along each axis from the centre: `{axis: {variant: {value: ratio}}}`."""
    measure: dict[str, Callable[..., Spread]] = {axis: members_ratio if axis in MANY else step_ratio for axis in points}
    lines = {axis: [*names, FROZEN] if axis in MANY else list(names) for axis in points}
    work = [(axis, name, value) for axis, values in points.items() for name in lines[axis] for value in values]
    found: dict[str, Any] = {axis: {name: {} for name in lines[axis]} for axis in points}
    for axis, name, value in tqdm(work, desc="scaling", mininterval=5):
        found[axis][name][str(value)] = measure[axis](name, {**CENTRE, axis: value}, repeats)
    return found


def measure(names: Sequence[str], points: Mapping[str, tuple[int, ...]], repeats: int) -> dict[str, Any]:
    """Do all measurements once, in this process."""
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(1)
    return {"centre": CENTRE, "layers": 2, "tokens": TOKENS, "member_tokens": MEMBER_TOKENS, "axes": scaling(names, points, repeats)}


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


def populations(width: int, layers: int, r: int, repeats: int) -> dict[str, Any]:
    """Time one step of many adapters, and per-example gradients, against a loop over them: LoRA on all linear layers."""
    model = llama(width, layers)
    adapt = ll.build(model, pairs(r)["lora"][0])
    found = {}
    for members, tokens in ((32, 16), (8, 32)):
        batch = batch_of(members, tokens)
        ids = batch["input_ids"]
        trees = [moved(adapt.init(seed=k)) for k in range(members)]
        stacked = ll.stack(trees)

        def together(stacked: Any = stacked, batch: Any = batch) -> Any:
            return ll.value_and_grad(lambda p: row_losses(adapt.mixed(p, batch), batch).sum())(stacked)

        def loop(trees: Any = trees, ids: Any = ids) -> Any:
            one = [{"input_ids": row[None], "use_cache": False} for row in ids]
            return [ll.value_and_grad(lambda p, b=b: row_losses(adapt(p, b), b).sum())(tree) for tree, b in zip(trees, one)]

        _agree(together()[1], [grads for _, grads in loop()])
        times = interleaved({"together": together, "loop": loop}, repeats)
        found[f"{members} members of {tokens} tokens"] = ratios(times, "loop")["together"]
    return {**found, **rows_apart(adapt, repeats)}


def rows_apart(adapt: ll.Adapt, repeats: int) -> dict[str, Any]:
    """Time per-example gradients against a loop and a whole-model `vmap`, and give the peak bytes of each, and of the norms alone."""
    batch, params = batch_of(16, 16), moved(adapt.init())
    ids = batch["input_ids"]

    def loss_of(p: Any, row: Any) -> torch.Tensor:
        one = {"input_ids": row[None], "use_cache": False}
        return row_losses(adapt(p, one), one).sum()

    calls = {
        "mixed": lambda: ll.per_example_grad(adapt, row_losses)(params, batch),
        "vmap": lambda: torch.vmap(torch.func.grad(loss_of), (None, 0))(params, ids),
        "loop": lambda: ll.stack([ll.value_and_grad(lambda p, row=row: loss_of(p, row))(params)[1] for row in ids]),
    }
    each = ll.unstack(calls["loop"]())
    for name in ("mixed", "vmap"):
        _agree(calls[name](), each)
    times = interleaved(calls, repeats)
    norms = {
        "mixed, norms": lambda: ll.per_example_norm(adapt, row_losses)(params, batch),
        "mixed, norms, four rows at a time": lambda: ll.per_example_norm(adapt, row_losses, chunk_size=4)(params, batch),
    }
    peaks = {name: peak_bytes(call) for name, call in {**calls, **norms}.items()}
    what = "gradients of 16 rows of 16 tokens"
    return {
        what: {**ratios(times, "loop")["mixed"], "over_vmap": ratios(times, "vmap")["mixed"], "peak_bytes": peaks},
        f"{what}, by vmap of the whole model": ratios(times, "loop")["vmap"],
    }


def _agree(stacked: Any, trees: list[Any]) -> None:
    for member, tree in zip(ll.unstack(stacked), trees):
        for a, b in zip(ll.tree_leaves(member), ll.tree_leaves(tree)):
            if float((a - b).abs().max()) > 1e-5:
                raise SystemExit("speed: expected the step of many adapters to equal the loop, found other gradients.")


if __name__ == "__main__":
    run([part()])
