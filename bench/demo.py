"""Adapt a pretrained model to real data with some variants, print the results and draw them.

The model is all-MiniLM-L6-v2 with a new head, the task the class of a definition in WordNet, one of 45 such as `noun.animal`. First the
head alone is trained, then each variant beside it, by `value_and_grad` and AdamW over a plain tree of params. Each adapter is saved, loaded
onto a fresh copy of the model and held against the one in memory; LoRA's is merged too. `--real` does the same with a language model,
SmolLM2-135M-Instruct, which writes the class's name.

    python -m tox run -e demo                    # a telling selection, a few minutes on two cores
    python -m tox run -e demo -- --real          # a language model
    python -m tox run -e demo -- --variants lora vera
    python -m tox run -e demo -- --variants all
"""

import argparse
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import quiet  # noqa: F401  # isort: skip  # before what talks
import lora_lite as ll  # isort: skip
from common.measure import machine, write
from common.methods import METHODS, demo_config
from common.pretrained import IGNORE, Gloss, batch, batches, class_of, load_classifier, load_glosses, load_smollm, spelt
from common.tables import title

HEAD, HEAD_RATE = r"^head$", 1e-2
TELLING, FEW = ("lora", "dora", "pissa", "ia3", "oft"), ("lora", "ia3")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of a variant: shares in [0, 1], times in seconds."""

    variant: str
    trained: int
    before: float
    after: float
    error: float
    seconds: float
    init: float


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data, and how an answer is told to be right.

    Attributes:
        load: the frozen model, in evaluation mode; or with its linear layers in 4 bits.
        data: the batches of a training, from a seed and a number of steps.
        test: the test batches.
        right: from an output and a batch, whether each row is right, `(rows,)`.
        head: whether a new head is trained beside each variant.
    """

    load: Callable[[bool], Any]
    data: Callable[[int, int], Iterator[dict[str, Tensor]]]
    test: Sequence[dict[str, Tensor]]
    right: Callable[[Any, dict[str, Tensor]], Tensor]
    head: bool


def definitions(steps: int, rows: int, test: int) -> Task:
    """Return the class of a definition, by MiniLM and a new head."""
    split = load_glosses(steps * rows, 0, test, tokens=24)
    tests = [batch(part) for part in by_length(split.test, 100)]
    return Task(
        load_classifier,
        lambda seed, steps: batches(split.train, rows, steps, seed),
        tests,
        lambda output, rows: output.logits.argmax(1) == rows["labels"],
        True,
    )


def written(steps: int, rows: int, test: int) -> Task:
    """Return the class of a definition, which SmolLM2 writes after it."""
    _, tokenizer = load_smollm()
    split = load_glosses(steps * rows, 0, test, tokens=24)

    def lay(part: Sequence[Gloss]) -> dict[str, Tensor]:
        return spelt([(f"Definition: {row.text[:120]}\nClass:", f" {class_of(row.label)}") for row in part], tokenizer)

    def right(output: Any, rows: dict[str, Tensor]) -> Tensor:
        labels = rows["labels"][:, 1:]
        return ((output.logits[:, :-1].argmax(-1) == labels) | (labels == IGNORE)).all(1)

    def data(seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return (lay([split.train[order[k % len(order)]] for k in range(rows * n, rows * (n + 1))]) for n in range(steps))

    return Task(lambda quantised: load_smollm(quantised)[0], data, [lay(part) for part in by_length(split.test, 25)], right, False)


def by_length(rows: Sequence[Gloss], size: int) -> list[list[Gloss]]:
    """Split rows into parts, those of about one length together."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@torch.no_grad()
def evaluate(task: Task, forward: Callable[[Any], Any]) -> tuple[float, float]:
    """Return the share of test rows that are right, and its standard error."""
    hits = torch.cat([task.right(forward({k: v for k, v in rows.items() if k != "labels"}), rows) for rows in task.test]).double()
    share = float(hits.mean())
    return share, math.sqrt(share * (1 - share) / len(hits))


def train(task: Task, adapt: ll.Adapt, params: Any, name: str, steps: int, rate: float) -> None:
    """Train params in place."""
    head, own = ([leaf for path, leaves in params.items() for leaf in leaves.values() if (path == "head") == is_head] for is_head in (1, 0))
    groups = [(leaves, peak) for leaves, peak in ((own, rate), (head, HEAD_RATE)) if leaves]
    optimizer = torch.optim.AdamW([{"params": leaves} for leaves, _ in groups], lr=rate, weight_decay=0.0)
    peaks = [peak for _, peak in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=max(steps, 4), pct_start=min(0.5, max(0.1, 2 / steps)))
    step = ll.value_and_grad(lambda p, rows: adapt(p, rows).loss)
    cfg, state, leaves = adapt.configs[0], METHODS[name].state(adapt) if name in METHODS else None, ll.tree_leaves(params)
    bar = tqdm(task.data(0, steps), total=steps, desc=f"{title(name):12}", mininterval=1, leave=False)
    for rows in bar:
        loss, grads = step(params, rows)
        ll.set_grads(params, grads)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        schedule.step()
        updated, state = cfg.update(params, grads, state)  # AdaLoRA prunes, AntiPaSTO projects, most do nothing
        with torch.no_grad():
            ll.tree_map(lambda leaf, new: leaf if new is leaf else leaf.copy_(new), params, updated)
        bar.set_postfix(loss=f"{float(loss):.2f}", refresh=False)


def verify(task: Task, adapt: ll.Adapt, params: Any, merge: bool) -> None:
    """Save, load onto a fresh copy and compare to the bit; merge into another and compare to rounding."""
    rows = task.test[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(adapt, params, path)
        again, read = ll.load(task.load(adapt.configs[0].original), path)
    with torch.no_grad():
        want = adapt(params, rows).logits
        if not torch.equal(again(read, rows).logits, want):
            raise SystemExit("demo: expected the reloaded adapter to give the same logits, found others.")
        if merge:
            merged = task.load(False)
            merged.load_state_dict(adapt.merge(params), strict=False)
            off = float((merged(**rows).logits - want).abs().max() / want.abs().max())
            if off > 1e-4:
                raise SystemExit(f"demo: expected the merged model within 1e-4 of the adapted one, found {off:.1e}.")


def config_of(task: Task, name: str, steps: int) -> ll.AdapterConfig:
    """Return a variant's config; a new head is not the variant's."""
    if name == "full":
        return ll.FullConfig(target_names=r"layers?\.\d+$")
    if name == "tokens":
        return ll.TokensConfig(token_ids=tuple(range(1000, 2000)))
    cfg = demo_config(name, steps)
    return dataclasses.replace(cfg, exclude_names=(HEAD,)) if task.head else cfg


def run(task: Task, name: str, model: Any, steps: int, before: float | None) -> Outcome:
    """Adapt the model with one variant, or train the head alone."""
    began = time.perf_counter()
    head = [ll.FullConfig(target_names=HEAD)] if task.head else []
    configs = head if name == "head" else [config_of(task, name, steps), *head]
    cfg, original = configs[0], None
    if cfg.original:  # what starts from the weights before quantisation needs a quantised base
        model, original = task.load(True), model.state_dict()
    adapt = ll.build(model, configs, calibration=list(task.data(1, 8)) if cfg.calibrated else None, original=original, progress=False)
    params = adapt.init(seed=0)
    init = time.perf_counter() - began
    rows = task.test[0]
    with torch.no_grad():
        if cfg.identity == 0.0 and not torch.equal(adapt(params, rows).logits, adapt.base(rows).logits):
            raise SystemExit(f"demo: expected {name} to start at the base model exactly, found another output.")
    train(task, adapt, params, name, steps, METHODS[name].short_rate or METHODS[name].rate if name in METHODS else HEAD_RATE)
    after, error = evaluate(task, lambda rows: adapt(params, rows))
    verify(task, adapt, params, merge=name == "lora")
    own = adapt.num_params - (task.head and name != "head") * sum(map(math.prod, adapt.shapes.get("head", {}).values()))
    return Outcome(name, own, after if before is None else before, after, error, time.perf_counter() - began, init)


def table(outcomes: Sequence[Outcome], was: str) -> str:
    """Lay the outcomes out, a variant a line."""
    lines = [f"{'variant':12} {'trained':>10} {was:>10} {'after':>7} {'± s.e.':>7} {'seconds':>8}"]
    for o in outcomes:
        numbers = f"{o.trained:>10,} {o.before:>10.1%} {o.after:>7.1%} {o.error:>7.1%} {o.seconds:>8.1f}"
        lines.append(f"{title(o.variant):12} {numbers}")
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], before: float, was: str, path: Path) -> None:
    """Draw accuracy against trained parameters."""
    import matplotlib as mpl  # here, since it takes a while

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for o in outcomes:
        axes.errorbar(o.trained, 100 * o.after, yerr=100 * o.error, fmt="o", color="tab:blue", capsize=2)
        axes.annotate(title(o.variant), (o.trained, 100 * o.after), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(100 * before, color="grey", lw=0.8, ls="--", label=was)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="right, %")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Run the demo, print its table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=[*METHODS, "all"], metavar="NAME")
    parser.add_argument("--real", action="store_true", help="adapt a language model, SmolLM2-135M, in place of the sentence encoder")
    parser.add_argument("--steps", type=int, help="default 100, or 40 of the language model")
    parser.add_argument("--rows", type=int, help="of a step; default 32, or 8 of the language model")
    parser.add_argument("--test", type=int, help="default 1000, or 200 of the language model")
    parser.add_argument("--plot", type=Path, default=Path("outputs/demo.png"), help="where the plot goes")
    parser.add_argument("--write", action="store_true", help="write a results file, as the documentation's table needs")
    o = parser.parse_args()
    steps, rows, test = o.steps or (40 if o.real else 100), o.rows or (8 if o.real else 32), o.test or (200 if o.real else 1000)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    begun = time.perf_counter()
    task = (written if o.real else definitions)(steps, rows, test)
    model = task.load(False)
    names = list(o.variants or (FEW if o.real else TELLING))
    if task.head:
        first = run(task, "head", model, steps, None)
        before, was = first.after, "head alone"
        print(f"The head alone, on the frozen encoder: {before:.1%} of {test} definitions right; saved, reloaded and verified", flush=True)
    else:
        before, was = evaluate(task, lambda rows: model(**rows))[0], "frozen"
        print(f"The frozen model writes the class of {before:.1%} of {test} definitions", flush=True)
    outcomes = []
    for name in METHODS if "all" in names else names:
        outcomes.append(run(task, name, model, steps, before))
        print(f"{title(name)}: {outcomes[-1].after:.1%} right; saved, reloaded and verified", flush=True)
    plot(outcomes, before, was, o.plot)
    minutes = (time.perf_counter() - begun) / 60
    print(f"\n{table(outcomes, was)}\n\n{test} test definitions, {steps} steps of {rows} rows, {minutes:.1f} minutes. Plot: {o.plot}")
    print("\nNext: docs/quickstart.md adapts a model of your own in ten lines; docs/choosing.md says which variant to take.")
    print("Beyond: python -m tox run -e demo -- --real (a language model), --variants all; python -m tox run -e real (all, beside PEFT).")
    if o.write:
        facts = {"steps": steps, "rows": rows, "test": test, "minutes": round(minutes, 2)}
        write("demo", machine(2), {**facts, "outcomes": [vars(outcome) for outcome in outcomes]})


if __name__ == "__main__":
    main()
