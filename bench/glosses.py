"""Train every variant on a real pretrained model, on real data: a definition's class among 45, by MiniLM. Write a results file.

The model is all-MiniLM-L6-v2 with mean pooling and a new head; the data are WordNet's definitions and their lexicographer classes. Each
variant is trained beside the head, which `FullConfig` trains. Its learning rates are the members of one population, one run for all: a
mixed batch whose members differ in rate. The best on validation glosses is the first seed's training; where it lies at an edge, the sweep
goes on beyond. Further seeds train at that rate, each on glosses of its own, and PEFT trains the same method at it. Each seed is tested on
glosses of its own. Below them is the linear probe, the head on the frozen encoder; above is full fine-tuning, the variant `full`.

    python -m tox run -e real                      # all of it; go on with what is left after an interruption: the same command again
    python bench/glosses.py --variants lora dora   # with the packages of bench/pretrained.txt
    python bench/glosses.py --quick                # minutes: shows that all works
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import lora_lite as ll
from agreement import agree
from common.contenders import wrapped
from common.measure import machine, write
from common.methods import FIRST, MEASURED, METHODS, demo_config, theirs
from common.pretrained import PAD, Gloss, Split, batch, batches, load_classifier, load_glosses
from quality import pruning, train_members, train_torch

HEAD = r"^head$"
HEAD_RATE = 1e-2
"""The head's peak learning rate beside every variant, from which the linear probe's sweep begins."""
MULTIPLES = (1 / 9, 1 / 3, 1.0, 3.0)
"""The rates of a sweep, of the variant's rate in the demo: four members of one population."""
EDGES = 2
"""The number of times that a sweep goes on where the best rate is its lowest or its highest."""
START = {"full": 1e-4}
"""The middle rates of the sweeps that begin elsewhere than at the demo's."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The setting of all trainings: steps, rows a step and member, seeds, glosses to validate and to test on, tokens of a gloss."""

    steps: int = 100
    rows: int = 32
    seeds: int = 2
    valid: int = 1000
    test: int = 10800
    tokens: int = 16

    def split(self) -> Split:
        """Return the glosses."""
        return load_glosses(self.steps * self.rows * self.seeds, self.valid, self.test, self.tokens)

    def data(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Return the batches of a seed: glosses that no other seed trains on."""
        return batches(self.split().train[seed :: self.seeds], self.rows, self.steps, seed)

    def tested(self, seed: int) -> list[Gloss]:
        """Return the test glosses of a seed."""
        return self.split().test[seed :: self.seeds]


OWN: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "full": lambda s: {"target_names": r"^encoder$"},
    "tokens": lambda s: {"token_ids": frequent(s, 1000)},
}
"""The fields that depend on the model. All other variants adapt the layers that they find by themselves, but for the head."""


@cache
def frequent(s: Setting, n: int) -> tuple[int, ...]:
    """Return the `n` most frequent tokens of the training glosses."""
    ids = torch.tensor([token for gloss in s.split().train for token in gloss.ids])
    return tuple(sorted(torch.bincount(ids).topk(n).indices.tolist()))


def config_of(name: str, s: Setting) -> ll.AdapterConfig:
    """Return a variant's config on this model."""
    if name in OWN:
        return ll.VARIANTS[name](**OWN[name](s))
    return dataclasses.replace(demo_config(name, s.steps), exclude_names=(HEAD,))


def calibration(name: str, s: Setting) -> list[dict[str, Tensor]]:
    """Return batches for a start that depends on data, of one row each: what PEFT's CorDA takes.

    EVA's are of a step's rows: PEFT leaves out a batch of fewer tokens than ranks, as many a gloss is.
    """
    rows, each = s.split().train, s.rows if name == "eva" else 1
    return [batch(rows[k : k + each]) for k in range(0, min(len(rows), 64 * each), each)]


# Trainings


def adapted(name: str, s: Setting) -> ll.Adapt:
    """Adapt the classifier by a variant, and train its head whole; the probe has the head alone."""
    head = ll.FullConfig(target_names=HEAD)
    model = load_classifier()
    if name == "probe":
        return ll.build(model, head)
    cfg = config_of(name, s)
    return ll.build(model, [cfg, head], calibration=calibration(name, s) if cfg.calibrated else None, progress=False)


def train_at(adapt: ll.Adapt, name: str, s: Setting, rates: Sequence[float], seeds: Sequence[int]) -> list[Any]:
    """Train a member at each rate, on the data of its seed, all in one mixed batch a step, and return their params."""
    adapt = adapt.train()  # PVeRA draws
    each, members = torch.tensor(rates), len(rates)
    head = each if name == "probe" else torch.full((members,), HEAD_RATE)

    def total(params: Any, rows: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
        found = cross_entropy(adapt.mixed(params, inputs).logits, rows["labels"], reduction="none")
        return found.unflatten(0, (members, -1)).mean(1).sum()

    data = joined(*(s.data(seed) for seed in seeds))
    return ll.unstack(train_members(adapt, total, data, s.steps, lambda path: head if path == "head" else each, members, seeds))


def joined(*streams: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Lay the members' batches under each other, padded to one length."""
    for parts in zip(*streams, strict=True):
        width = max(part["input_ids"].shape[1] for part in parts)
        padded = [{k: pad(v, (0, width - v.shape[1]), value=PAD) if v.dim() > 1 else v for k, v in part.items()} for part in parts]
        yield {key: torch.cat([part[key] for part in padded]) for key in parts[0]}


@torch.no_grad()
def evaluate(forward: Callable[[Any], Any], rows: Sequence[Gloss], size: int = 128) -> dict[str, float]:
    """Return the share of glosses whose class is the most likely one, and the mean loss; those of about one length go together."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    right = loss = 0.0
    for start in range(0, len(ordered), size):
        part = batch(ordered[start : start + size])
        logits = forward({key: part[key] for key in ("input_ids", "attention_mask")}).logits
        right += float((logits.argmax(1) == part["labels"]).sum())
        loss += float(cross_entropy(logits, part["labels"], reduction="sum"))
    return {"exact": right / len(rows), "loss": loss / len(rows)}


def sweep(name: str, s: Setting) -> dict[str, Any]:
    """Train a population of learning rates, go on beyond an edge, and test the best on validation glosses as the first seed."""
    began = time.perf_counter()
    adapt = adapted(name, s)
    built = time.perf_counter() - began
    middle = START.get(name) or (HEAD_RATE if name == "probe" else METHODS[name].short_rate or METHODS[name].rate)
    rates, reached, best = [m * middle for m in MULTIPLES], dict[float, dict[str, float]](), None
    for _ in range(1 + EDGES):
        for rate, member in zip(rates, train_at(adapt, name, s, rates, [0] * len(rates)), strict=True):
            reached[rate] = evaluate(lambda rows, p=member: adapt(p, rows), s.split().valid)
            if best is None or _better(reached[rate], reached[best[0]]):
                best = rate, member
        assert best is not None
        low, high = min(reached), max(reached)
        if low < best[0] < high:
            break
        rates = [low / 9, low / 3] if best[0] == low else [high * 3, high * 9]
    rate, member = best
    found = evaluate(lambda rows: adapt(member, rows), s.tested(0))
    own = adapt.num_params - (name != "probe") * sum(map(math.prod, adapt.shapes["head"].values()))
    facts = {"rate": rate, "params": own, "build_s": built, "minutes": (time.perf_counter() - began) / 60}
    return {**found, **facts, "sweep": [{"rate": r, **reached[r]} for r in sorted(reached)]}


def _better(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether a loss is lower; one that is not finite is higher than any."""
    return math.isfinite(a["loss"]) and not (math.isfinite(b["loss"]) and b["loss"] <= a["loss"])


def further(name: str, s: Setting, seed: int, rate: float) -> dict[str, Any]:
    """Train another seed at a rate and test it."""
    began = time.perf_counter()
    adapt = adapted(name, s)
    [params] = train_at(adapt, name, s, [rate], [seed])
    return {**evaluate(lambda rows: adapt(params, rows), s.tested(seed)), "minutes": (time.perf_counter() - began) / 60}


def train_peft(name: str, s: Setting, seed: int, rate: float) -> dict[str, Any]:
    """Let PEFT train the same method, beside the same head, at the same rate."""
    began = time.perf_counter()
    model, cfg = load_classifier(), config_of(name, s)
    torch.manual_seed(seed)
    config = theirs(cfg, [t.path for t in ll.find_targets(model, cfg)])
    config.modules_to_save = ["head"]
    start = getattr(config, "init_lora_weights", None)
    without = "labels" if start == "eva" else None  # EVA takes them for those of a text's tokens
    seen = [{key: value for key, value in part.items() if key != without} for part in calibration(name, s)]
    outer, leaves = wrapped(model, config, seen)
    inner = outer.get_base_model()
    if name == "ether":  # HRA's vectors start longer, so that the same rate turns them less: the trainings are compared from one start
        for path, leaf in adapted(name, s).init(seed=seed).items():
            if path != "head":
                inner.get_submodule(path).hra_u["default"].data.copy_(leaf["u"].t())
    head = [p for path, p in inner.named_parameters() if p.requires_grad and path.startswith("head.")]
    own = [p for p in leaves if not any(p is q for q in head)]
    inner.train()
    train_torch(lambda rows: inner(**rows).loss, [(own, rate), (head, HEAD_RATE)], s.data(seed), s.steps, pruning(outer))
    inner.eval()
    found = evaluate(lambda rows: inner(**rows), s.tested(seed))
    return {**found, "params": sum(p.numel() for p in own), "minutes": (time.perf_counter() - began) / 60}


Job = tuple[str, str, int]  # "ours" or "peft", the variant, the seed


def done(job: Job, s: Setting, rate: float | None) -> dict[str, Any]:
    """Do a training in a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    who, name, seed = job
    try:
        if who == "peft":
            assert rate is not None
            return train_peft(name, s, seed, rate)
        return sweep(name, s) if rate is None else further(name, s, seed, rate)
    except Exception as e:  # a row of the table that says so, rather than the end of a night's run
        return {"failed": f"{type(e).__name__}: {e}"}


# The run, which goes on where it was stopped


class Journal:
    """The results of trainings, a line each in a file that is only appended to; each line is on the disk before the next training ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[Job, dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text("utf-8").split("\n")[:-1] if path.exists() else ():  # what follows the last line's end was cut off
            who, name, seed, result = json.loads(line)
            self.found[who, name, seed] = result
        whole = "".join(self._line(job, result) for job, result in self.found.items())
        if path.exists() and path.read_text("utf-8") != whole:
            path.write_text(whole, "utf-8")

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Append a result."""
        self.found[job] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(job, result))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _line(job: Job, result: dict[str, Any]) -> str:
        return json.dumps([*job, result]) + "\n"


def run(names: Sequence[str], s: Setting, journal: Journal, workers: int) -> None:
    """Do all trainings that the journal lacks: first a sweep of each variant, then further seeds, then PEFT's."""
    ours = [*(n for n in FIRST if n in names), *(n for n in names if n not in FIRST)]
    beside = [n for n in ours if theirs(demo_config(n, s.steps)) is not None]
    phases: list[list[Job]] = [
        [("ours", n, 0) for n in ("probe", *ours)],
        [("ours", n, seed) for n in ("probe", *ours) for seed in range(1, s.seeds)],
        [("peft", n, seed) for n in beside for seed in range(s.seeds)],
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        bar = tqdm(total=sum(map(len, phases)), desc="glosses", mininterval=1, smoothing=0)
        for jobs in phases:
            left = []
            for job in jobs:
                rate = journal.found.get(("ours", job[1], 0), {}).get("rate")
                if job in journal.found or (rate is None and job[::2] != ("ours", 0)):  # done, or its sweep failed
                    bar.update()
                else:
                    left.append((job, rate))
            waiting: dict[Future[dict[str, Any]], Job] = {pool.submit(done, job, s, rate): job for job, rate in left}
            for future in as_completed(waiting):
                job, found = waiting[future], future.result()
                journal.add(job, found)
                bar.write(
                    f"{job[0]:4} {job[1]:12} seed {job[2]}: " + (found.get("failed") or f"{found['exact']:.1%}, loss {found['loss']:.3f}")
                )
                bar.update()
        bar.close()


def results(s: Setting, found: Mapping[Job, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of a journal: each variant's mean over its seeds, beside PEFT's, with the rates that were tried."""
    variants: dict[str, Any] = {}
    for name in dict.fromkeys(name for who, name, _ in found if who == "ours"):
        first = found["ours", name, 0]
        if "failed" in first:
            variants[name] = {"failed": first["failed"]}
            continue
        row: dict[str, Any] = {"ours": {**summary(name, "ours", s, found), **{k: first[k] for k in ("rate", "params", "build_s", "sweep")}}}
        if ("peft", name, 0) in found:
            theirs = summary(name, "peft", s, found)
            row |= {"peft": theirs} | ({} if "failed" in theirs else {"agree": agree(row["ours"], theirs)})
        variants[name] = row
    probe = variants.pop("probe", None)
    return {**dataclasses.asdict(s), "model": "all-MiniLM-L6-v2", "probe": probe and probe.get("ours"), "variants": variants}


def summary(name: str, who: str, s: Setting, found: Mapping[Job, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over a variant's seeds, with its standard error for new seeds and new glosses."""
    members = [found[who, name, k] for k in range(s.seeds) if (who, name, k) in found]
    failed = next((m["failed"] for m in members if "failed" in m), None)
    if failed:
        return {"failed": failed}
    exact = [m["exact"] for m in members]
    error = standard_error(exact, len(members) * (s.test // s.seeds))
    return {"exact": statistics.mean(exact), "error": error, "loss": statistics.mean(m["loss"] for m in members), "members": exact}


def standard_error(exact: Sequence[float], n: int) -> float:
    """Return the standard error of a mean over seeds that were tested on `n` glosses in all, each on its own.

    The variance between seeds holds that of their glosses, so that half of it is the mean's, for two seeds. It is known badly from so few;
    the error is never taken to be less than that of the glosses alone.
    """
    p = min(max(statistics.mean(exact), 0.5 / n), 1 - 0.5 / n)
    between = statistics.variance(exact) / len(exact) if len(exact) > 1 else 0.0
    return math.sqrt(max(between, p * (1 - p) / n))


def main() -> None:
    """Train the variants that are left, print the results, and write their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few variants, few steps: shows that all works, measures nothing")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, metavar="NAME")
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--seeds", type=int, default=Setting.seeds)
    parser.add_argument("--test", type=int, default=Setting.test, help="glosses, of all seeds together")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    parser.add_argument("--out", type=Path, default=Path("outputs/glosses"), help="where the run is kept")
    parser.add_argument("--report", action="store_true", help="train nothing; write the results file of what is there")
    o = parser.parse_args()
    s = Setting(steps=4, rows=16, seeds=1, valid=100, test=200) if o.quick else Setting(steps=o.steps, seeds=o.seeds, test=o.test)
    words = "-".join(f"{name}={value}" for name, value in dataclasses.asdict(s).items())
    journal = Journal(o.out / f"{words}.jsonl")
    if not o.report:
        run(o.variants or (list(FIRST[:7]) if o.quick else MEASURED), s, journal, o.workers)
    found = results(s, journal.found)
    for name, row in found["variants"].items():
        ours, peft = row.get("ours"), row.get("peft")
        said = row.get("failed") or f"{ours['exact']:.1%} ± {ours['error']:.1%} at {ours['rate']:.1e}, {ours['params']:,} params"
        beside = f"; PEFT {peft.get('failed') or format(peft['exact'], '.1%')}" if peft else ""
        print(f"{name:12} {said}{beside}")
    write("glosses", machine(1), found, o.quick)


if __name__ == "__main__":
    main()
