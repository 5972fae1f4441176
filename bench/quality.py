"""Train every variant on the demo's word problems and measure what it learned, and write a results file.

Several seeds of a variant train at once, as the members of one mixed batch over one frozen base. Beside them: the base as it is (below),
full fine-tuning (above), and PEFT's own training of the same method, a seed at a time (the control). The measure is the share of unseen
problems whose whole answer is the model's own greedy choice, read from one forward pass: greedy generation writes an answer exactly where
each of its characters is the most likely one after those before.

    python bench/quality.py                                      # minutes, on two cores
    python bench/quality.py --quick --variants lora
    python bench/quality.py --steps 300 --rows 32 --members 5    # what the demo trains
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

import lora_lite as ll
from arithmetic import Row, batch, batches, problems
from common import machine, write
from demo import load_base, settings
from learning import evaluate, train_full, train_ours, train_peft
from pairs import MEASURED, build, config_of, theirs

KINDS = ("more", "fewer")  # two of the demo's eight kinds of problem, short ones: training on them takes a tenth of the time
RATES = {"full": 1e-3, "ln_tuning": 2e-2}  # of variants that the demo does not know, where they are not LoRA's
FASTER = 2.0  # times the demo's rates, whose training is longer


@dataclass(frozen=True)
class Setting:
    """How everything trains: steps, rows a member a step, members (seeds), test problems."""

    steps: int
    rows: int
    members: int
    test: int


@cache
def short(split: str, n: int, seed: int) -> list[Row]:
    """Give `n` short problems."""
    found = [row for row in problems(split, 6 * n, seed) if any(f" {kind}" in row.template for kind in KINDS)]
    return found[:n]


def rate_of(name: str, steps: int) -> tuple[ll.AdapterConfig, float]:
    """Give a variant's config and learning rate: the demo's, or the benchmarks' for one that the demo does not know."""
    cfg, rate = settings(steps).get(name) or (config_of(name, 8), RATES.get(name, 5e-3))
    return cfg, FASTER * rate


def data_of(setting: Setting) -> tuple[list[Iterator[Any]], list[Row]]:
    """Give the batches of each member, each in an order of its own, and the test problems."""
    train = short("train", 1500, seed=0)
    return [batches(train, setting.rows, setting.steps, seed=k) for k in range(setting.members)], short("test", setting.test, seed=2)


def outcome(job: tuple[str, str, Setting]) -> dict[str, Any]:
    """Do one training: `("ours" | "peft" | "full" | "frozen", variant, setting)`, and say what the members reached."""
    who, name, setting = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    model, (data, test) = load_base(), data_of(setting)
    if who == "frozen":
        return summary([evaluate(lambda b: model(**b), test)])
    if who == "full":
        found = [train_full(load_base(), rows, test, setting.steps, rate=2e-3) for rows in data]
        return summary(found) | {"params": model.num_parameters()}
    cfg, rate = rate_of(name, setting.steps)
    calibration = [batch(short("train", 64, seed=0))]
    if who == "peft":
        found = [train_peft(load_base(), theirs(cfg), calibration, rows, test, setting.steps, rate, seed) for seed, rows in enumerate(data)]
        return summary(found)
    adapt = build(model, cfg, calibration)
    return summary(train_ours(adapt, data, test, setting.steps, rate)) | {"params": adapt.num_params, "rate": rate}


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


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Say whether two outcomes are equal within two standard errors of their difference."""
    return abs(a["exact"] - b["exact"]) <= 2 * math.hypot(a["error"], b["error"])


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
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=10, help="rows of a step, each member")
    parser.add_argument("--members", type=int, default=3, help="seeds, trained at once")
    parser.add_argument("--test", type=int, default=200, help="test problems")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    o = parser.parse_args()
    setting = Setting(2, 2, 2, 20) if o.quick else Setting(o.steps, o.rows, o.members, o.test)
    results = quality(o.variants, setting, o.workers)
    print(f"frozen {results['frozen']['exact']:.1%}, full fine-tuning {results['full']['exact']:.1%} ± {results['full']['error']:.1%}")
    for name, row in results["variants"].items():
        ours, beside = row["ours"], row.get("peft")
        peft = f"; PEFT {beside['exact']:.1%} ± {beside['error']:.1%}, {'equal' if row['agree'] else 'NOT EQUAL'}" if beside else ""
        print(f"{name:10} {ours['exact']:.1%} ± {ours['error']:.1%}, loss {ours['loss']:.3f}{peft}")
    write("quality", machine(threads=1), results, o.quick)


if __name__ == "__main__":
    main()
