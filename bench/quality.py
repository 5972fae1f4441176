"""Train every variant on word problems of the demo and measure what it learned, and write a results file.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

import lora_lite as ll
from agreement import agree
from arithmetic import Row, batch, batches, problems
from common import machine, write
from demo import load_base, settings
from learning import evaluate, train_full, train_ours, train_peft
from pairs import MEASURED, build, config_of, theirs

KIND = " gap"  # the demo's problems that ask for a difference: one skill, so that seeds agree after a training of half a minute
RATES = {
    **{"lora": 1.25e-3, "dora": 1.25e-3, "eva": 1.25e-3, "pissa": 1.25e-3, "asvd": 1.25e-3, "oft": 1.25e-3},
    **{"road": 1e-2, "ia3": 2.5e-2, "hra": 5e-3, "lora_xs": 2.5e-3, "ssvd": 2.5e-3, "antipasto": 1e-2},
    **{"vera": 8e-2, "bitfit": 4e-2, "ln_tuning": 1.6e-1, "full": 5e-4, "corda": 2e-4},
}
"""Peak learning rates for this training alone: the best of `--rates` on validation problems, where that is not the demo's own."""
FULL_RATE = 2.5e-4


@dataclass(frozen=True)
class Setting:
    """How everything trains: steps, rows a member a step, members (seeds), test problems."""

    steps: int
    rows: int
    members: int
    test: int


@cache
def drawn(split: str, n: int, seed: int) -> list[Row]:
    """Give `n` problems of the kind."""
    return [row for row in problems(split, 12 * n, seed) if KIND in row.template][:n]


def rate_of(name: str, steps: int) -> tuple[ll.AdapterConfig, float]:
    """Give a variant's config and learning rate; one that the demo does not know takes part with LoRA's."""
    cfg, rate = settings(steps).get(name) or (config_of(name, 8), 5e-3)
    return cfg, RATES.get(name, rate)


def data_of(setting: Setting) -> tuple[list[Iterator[Any]], list[Row]]:
    """Give the batches of each member, each in an order of its own, and the test problems."""
    train = drawn("train", 1500, seed=0)
    return [batches(train, setting.rows, setting.steps, seed=k) for k in range(setting.members)], drawn("test", setting.test, seed=2)


def calibration() -> list[dict[str, Any]]:
    """Give the batches for starts that depend on data: of one row each, which is what PEFT's CorDA takes, whose start depends on it."""
    return [batch([row]) for row in drawn("train", 64, seed=0)]


def outcome(job: tuple[str, str, Setting]) -> dict[str, Any]:
    """Do one training: `("ours" | "peft" | "full" | "frozen", variant, setting)`, and say what the members reached."""
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
    """Give the mean exact share and loss of `(exact, loss, test size)` members with the standard error over seeds and problems."""
    exact, losses, sizes = zip(*members, strict=True)
    error = standard_error(exact, sizes[0])
    return {"exact": statistics.mean(exact), "error": error, "loss": statistics.mean(losses), "members": list(exact)}


def standard_error(exact: Sequence[float], n: int) -> float:
    """Give the standard error of a mean over seeds for new seeds and new problems: both vary, and the problems are the same for all."""
    p = min(max(statistics.mean(exact), 0.5 / n), 1 - 0.5 / n)  # no share is known exactly from n problems
    between = statistics.variance(exact) / len(exact) if len(exact) > 1 else 0.0
    return math.sqrt(between + p * (1 - p) / n)


def quality(names: Sequence[str], setting: Setting, workers: int) -> dict[str, Any]:
    """Do all trainings, some at once, and give them by variant."""
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


if __name__ == "__main__":
    main()
