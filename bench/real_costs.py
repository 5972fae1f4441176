"""Measure each variant on SmolLM2-135M-Instruct beside the frozen model and PEFT's same method, and write a results file.

For two sizes of a batch: a training step, a forward pass, one generated token after the batch as a prompt, and their peaks of memory; once
the start, `build` and `init` on the whole model. Outputs are checked before they are timed, and ratios are taken within rounds. Each
variant has a process of its own, and its row is on the disk before the next begins: the same command goes on where it was stopped.

    python bench/real_costs.py                          # ten minutes a variant on a core, the most used ones first
    python bench/real_costs.py --variants lora dora --sizes 2x64
    python bench/real_costs.py --quick                  # a minute: a small model in SmolLM2's place
"""

import argparse
import copy
import datetime
import inspect
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.contenders import Contender, build, contender, forwards, steps, wrapped
from common.measure import QUICK, RESULTS, Call, batch_of, device, interleaved, llama, machine, peak_bytes, settled, without_rounds
from common.methods import FIRST, MEASURED, Pair, drawn_start, pairs
from common.pretrained import SMOLLM, load_smollm
from common.record import Record, described, file_name
from speed import compared, counts

SIZES = {"2x64": (2, 64), "8x128": (8, 128)}
"""Rows and tokens of a batch."""
SMALL = {"2x8": (2, 8)}
"""The size of a quick run."""
ROUNDS = 5


def load(model: str) -> Any:
    """Load SmolLM2 or, by another name, a small Llama in its place; frozen, in evaluation mode, on the device."""
    return (load_smollm()[0] if model == SMOLLM else llama(64, 2)).eval().to(device())


def one(name: str, model: str, sizes: Mapping[str, tuple[int, int]], r: int, repeats: int, threads: int) -> dict[str, Any]:
    """Return the row of a variant: facts, costs by size, and the start.

    Raises:
        SystemExit: where an output or a gradient is wrong.
    """
    warnings.filterwarnings("ignore", module="(transformers|peft|torch)")
    torch.set_num_threads(threads)
    base, pair = load(model), pairs(r)[name]
    batches = {size: batch_of(*shape) for size, shape in sizes.items()}
    first = next(iter(batches.values()))
    c = contender(base, pair, first)
    found = {**counts(pair, c), "sizes": {size: costs(base, c, batch, repeats) for size, batch in batches.items()}}
    return {**found, "init": compared(start(base, pair, first))}


def costs(base: Any, c: Contender, batch: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Return the times of a step, a forward pass and a generated token on one batch, and the peaks of the first two."""
    step, forward = steps(base, c, batch), forwards(base, c, batch)
    return {
        "step": compared(interleaved(step, repeats)),
        "forward": compared(interleaved(forward, repeats)),
        "token": compared(interleaved(tokens(base, c, batch), 4 * repeats)),
        "peak": {"step": {who: peak_bytes(call) for who, call in step.items()}, "forward": {w: peak_bytes(f) for w, f in forward.items()}},
    }


def tokens(base: Any, c: Contender, batch: Mapping[str, Any]) -> dict[str, Call]:
    """Return the generation of one token for each row after the batch as a prompt, by the frozen model, ours and PEFT's."""
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"  # from transformers 5.24 on, and before
    models = {"frozen": lambda rows: base(**rows), "ours": lambda rows: c.adapt(c.params, rows)}
    if c.theirs is not None:
        models["peft"] = lambda rows: c.theirs(**rows)
    calls = {}
    for who, model in models.items():
        with torch.no_grad():
            cache = model({"input_ids": batch["input_ids"], "use_cache": True}).past_key_values

        def call(model: Any = model, cache: Any = cache) -> None:
            model({"input_ids": batch["input_ids"][:, -1:], name: cache, "use_cache": True})
            cache.crop(-1)

        calls[who] = torch.no_grad()(call)
    return calls


def start(base: Any, pair: Pair, batch: Mapping[str, Any]) -> dict[str, list[float]]:
    """Time `build` and `init` on the whole model, and PEFT's on a copy: three rounds where a start is drawn, one where it is decomposed."""
    rounds = 3 if (drawn_start(pair.peft) if pair.peft else "dense" not in pair.cfg.uses) and not pair.cfg.calibrated else 1
    calls: dict[str, Call] = {"ours": lambda: build(base, pair.cfg, [batch]).init(seed=0)}
    times = {name: [] for name in ("ours", "peft")} if pair.peft else {"ours": []}
    for _ in range(rounds):
        if pair.peft:
            changed = copy.deepcopy(base)  # one at a time: PEFT changes the model that it adapts
            calls["peft"] = lambda changed=changed: wrapped(changed, copy.deepcopy(pair.peft), [batch])
        for name, values in interleaved(calls, 1, warmup=0).items():
            times[name] += values
    return times


def record_of(quick: bool, facts: Mapping[str, Any]) -> Record:
    """Go on with the newest file of the same facts, or begin today's."""
    folder, date = QUICK if quick else RESULTS, datetime.date.today().isoformat()
    name = file_name(date, facts, "real-costs")
    older = sorted(folder.glob(f"*{name.removeprefix(date)}"))
    return Record(older[-1] if older else folder / name, older[-1].name[:10] if older else date, facts)


def measure(names: Sequence[str], model: str, sizes: Mapping[str, tuple[int, int]], r: int, repeats: int, record: Record) -> dict[str, str]:
    """Measure the rows that the record lacks, each in a fresh process; return the failures, by variant."""
    failed, threads = {}, record.tree["threads"]
    for key, value in {"model": model, "r": r}.items():
        record.keep((key,), value)
    for name in tqdm(names, desc="variants", mininterval=5):
        kept = record.tree["results"].get("variants", {}).get(name, {})
        lacking = {size: shape for size, shape in sizes.items() if size not in kept.get("sizes", {})}
        if not lacking:
            continue
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                row = without_rounds(fresh.submit(settled, one, name, model, lacking, r, repeats, threads).result())
        except (Exception, SystemExit) as e:  # whatever it is, the other variants go on
            failed[name] = described(e)
            tqdm.write(f"{name:12} failed: {failed[name]}")
            continue
        row["sizes"] = {**kept.get("sizes", {}), **row["sizes"]}
        record.keep(("variants", name), row)
        tqdm.write(f"{name:12} {said(row)}")
    return failed


def said(row: Mapping[str, Any]) -> str:
    """Return a row in words."""
    parts = []
    for size, found in row["sizes"].items():
        cells = [f"{what} {found[what]['over_peft']['median']:.2f}" for what in ("step", "forward", "token") if "over_peft" in found[what]]
        frozen = f"step {found['step']['over_frozen']['median']:.2f} of the frozen one's"
        parts.append(f"{size}: {frozen}" + (f"; of PEFT's {', '.join(cells)}" if cells else ""))
    return "; ".join(parts)


def main(options: Sequence[str] | None = None) -> None:
    """Measure the variants that are asked for; end with an error where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two variants on a small model, few rounds: shows that all works")
    parser.add_argument("--variants", nargs="+", choices=MEASURED, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="rows x tokens of a batch")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--repeats", type=int, help=f"rounds of each measurement; {ROUNDS} if not given")
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args(options)
    names = o.variants or (["lora", "oft"] if o.quick else [*FIRST, *(n for n in MEASURED if n not in FIRST)])
    model, sizes = ("small Llama", SMALL) if o.quick else (SMOLLM, {size: SIZES[size] for size in o.sizes})
    record = record_of(o.quick, machine(o.threads, where=device()))
    failed = measure(names, model, sizes, 8 if o.quick else o.rank, o.repeats or (2 if o.quick else ROUNDS), record)
    print(f"wrote {Path(record.path).relative_to(RESULTS.parent.parent)}")
    if failed:
        raise SystemExit(f"real_costs: {len(failed)} of {len(names)} variants failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
