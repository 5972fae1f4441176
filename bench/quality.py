"""Train every variant on word problems of the demo measure the accuracy and write a results file.

Several seeds of a variant train at once, as the members of one mixed batch over one frozen base. Beside them: the base as it is (below),
full fine-tuning (above), and PEFT's own training of the same method, a seed at a time (the control). The measure is the share of unseen
problems whose whole answer is the model's own greedy choice, read from one forward pass: greedy generation writes an answer exactly where
each of its characters is the most likely one after those before.

    python bench/quality.py                                # minutes, on two cores
    python bench/quality.py --quick --variants lora
    python bench/quality.py --rates 0.25 0.5 1 2 4         # how the rates were chosen: each a member, on problems of their own
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import lora_lite as ll
from agreement import agree
from common.arithmetic import IGNORE, PAD, Row, batch, batches, problems
from common.contenders import build, wrapped
from common.measure import machine, write
from common.methods import MEASURED, METHODS, demo_config, theirs
from common.pretrained import load_base

KIND = " gap"  # the demo's problems that ask for a difference: one skill, so that seeds agree after a training of half a minute
FULL_RATE = 2.5e-4


@dataclass(frozen=True)
class Setting:
    """The setting of all trainings: steps, rows a member a step, members (seeds), test problems."""

    steps: int
    rows: int
    members: int
    test: int


@cache
def drawn(split: str, n: int, seed: int) -> list[Row]:
    """Return `n` problems of the kind."""
    return [row for row in problems(split, 12 * n, seed) if KIND in row.template][:n]


def rate_of(name: str, steps: int) -> tuple[ll.AdapterConfig, float]:
    """Return a variant's config and its peak learning rate for this training."""
    row = METHODS[name]
    return demo_config(name, steps), row.short_rate or row.rate


def data_of(setting: Setting) -> tuple[list[Iterator[Any]], list[Row]]:
    """Return the batches of each member, each in an order of its own, and the test problems."""
    train = drawn("train", 1500, seed=0)
    return [batches(train, setting.rows, setting.steps, seed=k) for k in range(setting.members)], drawn("test", setting.test, seed=2)


def calibration() -> list[dict[str, Any]]:
    """Return the batches for starts that depend on data: of one row each, which is what PEFT's CorDA takes, whose start depends on it."""
    return [batch([row]) for row in drawn("train", 64, seed=0)]


def outcome(job: tuple[str, str, Setting]) -> dict[str, Any]:
    """Train once: `("ours" | "peft" | "full" | "frozen", variant, setting)`, and return its members' results."""
    who, name, setting = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    model, (data, test) = load_base(), data_of(setting)
    if who == "frozen":
        return summary([evaluate(lambda b: model(**b), test)])
    if who == "full":
        found = [train_full(load_base(), rows, test, setting.steps, FULL_RATE) for rows in data]
        return summary(found) | {"params": model.num_parameters()}
    cfg, rate = rate_of(name, setting.steps)
    if who == "peft":
        found = [
            train_peft(load_base(), theirs(cfg), calibration(), rows, test, setting.steps, rate, seed) for seed, rows in enumerate(data)
        ]
        return summary(found)
    adapt = build(model, cfg, calibration())
    found = train_ours(adapt, data, test, setting.steps, [rate] * setting.members)
    return summary(found) | {"params": adapt.num_params, "rate": rate}


def at_rates(name: str, setting: Setting, multiples: Sequence[float]) -> list[tuple[float, float, float]]:
    """Train a variant at multiples of its rate; give each rate with the exact share and the loss on validation problems."""
    cfg, rate = rate_of(name, setting.steps)
    adapt, rates = build(load_base(), cfg, calibration()), [m * rate for m in multiples]
    data, _ = data_of(replace(setting, members=len(rates)))
    reached = train_ours(adapt, data, drawn("test", setting.test, seed=9), setting.steps, rates)
    return [(rate, exact, loss) for rate, (exact, loss, _) in zip(rates, reached, strict=True)]


def summary(members: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the mean exact share and loss of `(exact, loss, test size)` members with the standard error over seeds and problems."""
    exact, losses, sizes = zip(*members, strict=True)
    error = standard_error(exact, sizes[0])
    return {"exact": statistics.mean(exact), "error": error, "loss": statistics.mean(losses), "members": list(exact)}


def standard_error(exact: Sequence[float], n: int) -> float:
    """Return the standard error of a mean over seeds for new seeds and new problems: both vary, and the problems are the same for all."""
    p = min(max(statistics.mean(exact), 0.5 / n), 1 - 0.5 / n)  # no share is known exactly from n problems
    between = statistics.variance(exact) / len(exact) if len(exact) > 1 else 0.0
    return math.sqrt(between + p * (1 - p) / n)


def quality(names: Sequence[str], setting: Setting, workers: int) -> dict[str, Any]:
    """Do all trainings, some at once, and return their outcomes by variant."""
    jobs = [("frozen", "", setting), ("full", "", setting), *(("ours", n, setting) for n in names)]
    jobs += [("peft", n, setting) for n in names if theirs(rate_of(n, setting.steps)[0]) is not None]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        outcomes = list(tqdm(pool.map(outcome, jobs), total=len(jobs), desc="quality", mininterval=5))
    done = {(who, name): found for (who, name, _), found in zip(jobs, outcomes, strict=True)}
    variants: dict[str, Any] = {n: {"ours": done["ours", n]} for n in names}
    for who, n in done:
        if who == "peft":
            variants[n] |= {"peft": done[who, n], "agree": agree(done["ours", n], done[who, n])}
    return {**vars(setting), "frozen": done["frozen", ""], "full": done["full", ""], "variants": variants}


def main() -> None:
    """Train, print and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each variant: shows that all train, measures nothing")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, default=MEASURED, metavar="NAME")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, each member")
    parser.add_argument("--members", type=int, default=2, help="seeds, trained at once")
    parser.add_argument("--test", type=int, default=200, help="test problems")
    parser.add_argument("--rates", nargs="+", type=float, metavar="MULTIPLE", help="print what multiples of the rates reach; write nothing")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    o = parser.parse_args()
    setting = Setting(2, 2, 2, 20) if o.quick else Setting(o.steps, o.rows, o.members, o.test)
    if o.rates:
        for name in o.variants:
            for rate, exact, loss in at_rates(name, setting, o.rates):
                print(f"{name:10} {rate:.1e}  {exact:.1%}, loss {loss:.3f}", flush=True)
        return
    results = quality(o.variants, setting, o.workers)
    print(f"frozen {results['frozen']['exact']:.1%}, full fine-tuning {results['full']['exact']:.1%} ± {results['full']['error']:.1%}")
    for name, row in results["variants"].items():
        ours, beside = row["ours"], row.get("peft")
        peft = f"; PEFT {beside['exact']:.1%} ± {beside['error']:.1%}, {'equal' if row['agree'] else 'NOT EQUAL'}" if beside else ""
        print(f"{name:10} {ours['exact']:.1%} ± {ours['error']:.1%}, loss {ours['loss']:.3f}{peft}")
    write("quality", machine(threads=1), results, o.quick)


Reached = tuple[float, float, int]  # exact share, loss a character, test problems


def losses(output: Any, labels: Tensor) -> Tensor:
    """Return the loss of each character, `(rows, length - 1)`, zero where there is no label."""
    logits, wanted = output.logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="none").view(wanted.shape)


@torch.no_grad()
def evaluate(forward: Callable[[Any], Any], test: Sequence[Row], size: int = 50) -> Reached:
    """Return the share of answers that greedy generation would write exactly, and the mean loss of their characters."""
    right, total, count = 0, 0.0, 0
    for start in range(0, len(test), size):
        rows = batch(test[start : start + size])
        output, labelled = forward({"input_ids": rows["input_ids"], "use_cache": False}), rows["labels"][:, 1:] != IGNORE
        chosen = output.logits[:, :-1].argmax(-1)
        right += int(((chosen == rows["labels"][:, 1:]) | ~labelled).all(1).sum())
        total, count = total + float(losses(output, rows["labels"]).sum()), count + int(labelled.sum())
    return right / len(test), total / count, len(test)


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Lay the members' batches under each other, padded to one length."""
    width = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": PAD, "labels": IGNORE}
    return {k: torch.cat([pad(part[k], (0, width - part[k].shape[1]), value=v) for part in parts]) for k, v in fill.items()}


def train_ours(adapt: ll.Adapt, data: Sequence[Iterator[Any]], test: Sequence[Row], steps: int, rates: Sequence[float]) -> list[Reached]:
    """Train a member on each stream of batches at its own rate, all in one mixed batch a step, and evaluate each."""
    members = len(data)

    def total(params: Any, rows: Mapping[str, Tensor]) -> Tensor:
        found = losses(adapt.mixed(params, {"input_ids": rows["input_ids"]}, use_cache=False), rows["labels"])
        labelled = (rows["labels"][:, 1:] != IGNORE).unflatten(0, (members, -1)).flatten(1)
        return (found.unflatten(0, (members, -1)).flatten(1).sum(1) / labelled.sum(1)).sum()

    each = torch.tensor(rates)
    params = train_members(adapt, total, (joined(parts) for parts in zip(*data, strict=True)), steps, lambda path: each, members)
    return [evaluate(lambda rows, p=member: adapt(p, rows), test) for member in ll.unstack(params)]


def train_members(
    adapt: ll.Adapt,
    total: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    steps: int,
    rates: Callable[[str], Tensor],
    members: int,
    seeds: Sequence[int] | None = None,
) -> Any:
    """Train a population by AdamW, each member as it would train alone, and return its stacked params.

    Args:
        adapt: the adapted model; the first of its configs is the variant's.
        total: from stacked params and a batch of all members, the sum of the members' losses.
        data: the batches.
        steps: how many there are.
        rates: from the path of a target, the peak learning rate of each member there, `(members,)`.
        members: how many there are.
        seeds: of the members' starts; 0, 1, 2 ... where not given.
    """
    params = ll.stack([adapt.init(seed=k) for k in seeds or range(members)])
    leaves = ll.tree_leaves(params)
    each = [rates(path) for path, leaves_of in params.items() for _ in leaves_of]
    # Each member goes its rate's part of the way of a step at rate 1, which without decay is a step at its rate.
    adam = torch.optim.AdamW(leaves, lr=1.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1.0, total_steps=max(steps, 2), pct_start=0.1)
    state: list[Any] = [METHODS[adapt.configs[0].name].state(adapt)] * members
    step = ll.value_and_grad(total)
    for rows in data:
        grads = step(params, rows)[1]
        norm = torch.stack([g.reshape(members, -1).square().sum(1) for g in ll.tree_leaves(grads)]).sum(0).sqrt()  # (members,)
        over = norm.clamp(min=1.0)
        ll.set_grads(params, ll.tree_map(lambda grad, over=over: grad / _along(over, grad), grads))
        before = [leaf.clone() for leaf in leaves]
        adam.step()
        schedule.step()
        for leaf, old, rate in zip(leaves, before, each, strict=True):
            leaf.copy_(torch.lerp(old, leaf, _along(rate, leaf)))
        state = updated(adapt.configs[0], params, grads, state)
    return params


def _along(values: Tensor, leaf: Tensor) -> Tensor:
    """Lay a number of each member along a stacked leaf's other axes."""
    return values.view(-1, *[1] * (leaf.dim() - 1))


@torch.no_grad()
def updated(cfg: ll.AdapterConfig, params: Any, grads: Any, state: list[Any]) -> list[Any]:
    """Update each member in place as its method does after a step (AdaLoRA prunes, AntiPaSTO projects), and return the next state."""
    if type(cfg).update is ll.AdapterConfig.update:
        return state
    done = [cfg.update(p, g, s) for p, g, s in zip(ll.unstack(params), ll.unstack(grads), state, strict=True)]
    ll.tree_map(lambda leaf, new: leaf.copy_(new), params, ll.stack([p for p, _ in done]))
    return [s for _, s in done]


Group = tuple[Sequence[Tensor], float]  # leaves, and their peak learning rate


def train_torch(
    loss: Callable[[Any], Tensor], groups: Sequence[Group], data: Iterable[Any], steps: int, after: Callable[[int], None] = lambda _: None
) -> None:
    """Train a module's parameters in place by AdamW, as `train_members` trains a member."""
    leaves = [leaf for group, _ in groups for leaf in group]
    adam = torch.optim.AdamW([{"params": list(group), "lr": rate} for group, rate in groups], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, [rate for _, rate in groups], total_steps=max(steps, 2), pct_start=0.1)
    for number, rows in enumerate(data):
        adam.zero_grad()
        loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        adam.step()
        schedule.step()
        after(number)


def train_peft(
    model: nn.Module, config: Any, calibration: Sequence[Any], data: Iterator[Any], test: Sequence[Row], steps: int, rate: float, seed: int
) -> Reached:
    """Let PEFT adapt the model in place and train it as ours are trained."""
    torch.manual_seed(seed)
    adapted, leaves = wrapped(model, config, calibration)
    inner = adapted.get_base_model()  # without AdaLoRA's penalty, which the loop of ours leaves out too
    train_torch(lambda rows: inner(**rows, use_cache=False).loss, [(leaves, rate)], data, steps, pruning(adapted))
    return evaluate(lambda rows: inner(**rows), test)


def pruning(adapted: Any) -> Callable[[int], None]:
    """Return the function that PEFT has the user's loop call after a step: AdaLoRA's pruning, for others nothing."""
    found: Callable[[int], None] = getattr(adapted.base_model, "update_and_allocate", lambda _: None)
    return found


def train_full(model: nn.Module, data: Iterator[Any], test: Sequence[Row], steps: int, rate: float) -> Reached:
    """Train every parameter of the model, in place."""
    group = (list(model.requires_grad_().parameters()), rate)
    train_torch(lambda rows: model(**rows, use_cache=False).loss, [group], data, steps)
    return evaluate(lambda rows: model(**rows), test)


if __name__ == "__main__":
    main()
