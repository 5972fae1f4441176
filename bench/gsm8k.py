"""Train on MetaMathQA, test on GSM8K: the lineage's own measure, on any causal language model of the Hub or of a folder.

`--table` takes the settings of one of the two tables that wassname/lora-lite published, or of `symbolic`: SmolLM2-135M-Instruct on
GSM-Symbolic, both out of the packages of `pretrained.txt`, tested on templates that no training sees. Options change them one by one. A
run that was stopped goes on where it was when it is started again. `--probe` takes a few steps on one batch and prints a row of facts.

    python bench/gsm8k.py --variant lora                               # Qwen3-0.6B-Base, q and v, 5000 steps of 4
    python bench/gsm8k.py --variant dora --table qwen3.5               # Qwen3.5-0.8B-Base, down_proj, 2500 steps of 8
    python bench/gsm8k.py --variant lora --table symbolic              # SmolLM2-135M-Instruct, 500 steps of 16; no Hub
    python bench/gsm8k.py --variant antipasto --set basis=corda --table qwen3.5
    python bench/gsm8k.py --variant hra --probe --steps 8 --rate 5e-3
"""

import argparse
import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from common.gsm8k_data import CALIBRATED, CALIBRATION, TABLES, Settings, batch, config, evaluate, problems, published
from common.gsm8k_train import ADAPTER, build, gradients, load_model, norm, prepare, start, step_of, train, training_examples
from common.measure import device, machine, write
from common.methods import rank
from common.record import described


def run(s: Settings, out: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Train and test one variant, with everything that a stopped run needs in a folder in `out`; give its results.

    The costs of a step are measured at its start unless they are given as `facts`.

    Raises:
        ValueError, TypeError: where a setting, the model, the data or what is in the folder doesn't fit, before anything is written.
    """
    folder = out / run_name(s)
    tests = problems(s.test_data, s.valid, s.test, s.seed)
    model, tokenizer = load_model(s, device())
    data, pad = training_examples(s, tokenizer), tokenizer.pad_token_id
    adapt, state = start(s, model, data, pad, folder, facts)
    params, losses = train(s, adapt, data, pad, state, folder)
    ll.save(adapt, params, folder / ADAPTER)
    module = adapt.module(params).eval()
    found = {name: evaluate(s, module, tokenizer, rows, folder / f"{name}.jsonl") for name, rows in tests.items()}
    facts = {"r": rank(config(s)), "params": adapt.num_params, "macs_per_token": adapt.macs_per_token, **state["facts"]}
    return {"settings": shown(s), **found, **facts, "first_loss": losses[0], "last_loss": losses[-1]}


def frozen(s: Settings, out: Path) -> dict[str, Any]:
    """Test the model as it is, before any training."""
    model, tokenizer = load_model(s, device())
    folder = out / f"{shown(s)['model']}-frozen-{s.dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    tests = problems(s.test_data, s.valid, s.test, s.seed)
    return {name: evaluate(s, model, tokenizer, rows, folder / f"{name}.jsonl") for name, rows in tests.items()}


def measured(s: Settings, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the facts of a variant's start and step, without a training, on a model that any number of variants may share."""
    few = dataclasses.replace(s, steps=min(s.steps, max(CALIBRATION.get(s.variant, CALIBRATED), 1)))
    return prepare(s, model, training_examples(few, tokenizer), tokenizer.pad_token_id)[1]


def runs(jobs: Mapping[str, tuple[Settings, Mapping[str, Any]]], out: Path, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do several runs at once, in processes that end with this one: each name with its results, or with `{"failed": ...}`.

    Args:
        jobs: by name, the settings of a run and the facts of its costs.
        out: where the runs are kept.
        workers: the number of processes.
    """
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_named, [(name, s, facts, out) for name, (s, facts) in jobs.items()])


def _named(job: tuple[str, Settings, Mapping[str, Any], Path]) -> tuple[str, dict[str, Any]]:
    name, s, facts, out = job
    torch.set_num_threads(1)
    try:
        return name, run(s, out, facts)
    except (Exception, SystemExit) as e:  # whatever it is, the other runs go on
        return name, {"failed": described(e)}


def shown(s: Settings) -> dict[str, Any]:
    """Return the settings as a results file has them: a file or folder of this machine by its name alone, since its place says nothing."""
    sources = {field: getattr(s, field) for field in ("model", "train_data", "test_data")}
    return dataclasses.asdict(s) | {field: Path(x).resolve().name if Path(x).exists() else x for field, x in sources.items()}


def run_name(s: Settings) -> str:
    """Name a run's folder and its results file."""
    own = {"r": rank(config(s)), "rate": s.rate, **dict(s.fields)}
    words = "".join(f"-{name}={value}" for name, value in own.items() if value is not None)
    return re.sub(r"[^\w.=-]+", "--", f"{shown(s)['model']}-{s.variant}{words}-{s.steps}x{s.rows * s.accumulate}-seed{s.seed}")


def probe(s: Settings, out: Path) -> dict[str, Any]:
    """Train a few steps on one fixed batch and give a row of facts about the adapter.

    Raises:
        SystemExit: where a perturbation has no effect, the loss does not fall, a base weight got a gradient, or reloading changes logits.
    """
    model, tokenizer = load_model(s, device())
    data = training_examples(dataclasses.replace(s, steps=1, accumulate=1), tokenizer)
    rows = batch(data, tokenizer.pad_token_id, model.device)
    adapt = build(s, model, data, tokenizer.pad_token_id)
    params = adapt.init(seed=s.seed)
    begin = ll.tree_map(torch.clone, params)
    torch.manual_seed(s.seed)
    with torch.no_grad():
        base, fresh = adapt.base(rows, use_cache=False).logits, adapt(params, rows, use_cache=False).logits
        # By noise: what moves all entries alike is lost on HRA, whose reflections start as pairs that cancel.
        perturbed = adapt(ll.tree_map(lambda p: p + 0.25 * torch.randn_like(p), params), rows, use_cache=False).logits
    adam = torch.optim.AdamW(ll.tree_leaves(params), lr=s.rate)
    losses, norms, step = [], [], step_of(adapt)
    for _ in range(s.steps):
        loss, grads = gradients(step, params, [rows])
        losses.append(loss)
        norms.append(norm(grads))
        ll.set_grads(params, grads)
        adam.step()
    losses.append(gradients(step, params, [rows])[0])
    out.mkdir(parents=True, exist_ok=True)
    place = out / f"probe-{s.variant}.safetensors"
    ll.save(adapt, params, place)
    again, kept = ll.load(load_model(s, device())[0], place)
    with torch.no_grad():
        reload = (again(kept, rows, use_cache=False).logits - adapt(params, rows, use_cache=False).logits).abs().max()
    row = {
        **{"variant": s.variant, "targets": len(adapt.targets), "trained": adapt.num_params},
        **{"identity error": float((fresh - base).abs().max()), "perturbation": float((perturbed - fresh).abs().max())},
        **{"first loss": losses[0], "last loss": losses[-1], "gradient norm": norms[0]},
        **{"moved": norm(ll.tree_map(torch.sub, params, begin)), "base gradients": sum(p.grad is not None for p in model.parameters())},
        "reload error": float(reload),
    }
    require(row)
    return row


def require(row: dict[str, Any]) -> None:
    """Raise unless a row is that of a working adapter."""
    faults = [name for name in ("perturbation", "gradient norm", "moved") if not row[name] > 0]
    faults += [name for name in ("base gradients", "reload error") if row[name] != 0]
    faults += ["last loss"] if not row["last loss"] < row["first loss"] else []
    if faults:
        raise SystemExit(f"gsm8k: expected an adapter that acts, learns and reloads, found {', '.join(faults)} to be wrong in {row}.")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=list(TABLES), default="qwen3", help="whose settings to take")
    parser.add_argument("--probe", action="store_true", help="a few steps on one batch, and a row of facts")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="FIELD=VALUE", help="fields of the variant's config")
    parser.add_argument("--out", type=Path, default=Path("outputs/gsm8k"), help="where the run is kept")
    choices = {"variant": list(ll.VARIANTS), "dtype": ["bfloat16", "float16", "float32"]}
    for field in dataclasses.fields(Settings):
        if field.name not in ("fields", "tuned"):
            kind = int if field.name in ("test", "valid") else type(field.default)
            more = {"type": kind, "choices": choices.get(field.name), "help": f"default {field.default} (LoRA, table qwen3)"}
            parser.add_argument(f"--{field.name.replace('_', '-')}", **more)
    return parser.parse_args()


def settings_of(o: argparse.Namespace) -> Settings:
    """Return the variant's settings in the table, changed by the options.

    Raises:
        ValueError: for a number out of range, or a word of --set that sets nothing.
    """
    given = {f.name: getattr(o, f.name) for f in dataclasses.fields(Settings) if f.name not in ("fields", "tuned")}
    given = {name: value for name, value in given.items() if value is not None}
    bare = [word for word in o.set if "=" not in word]
    if bare:
        raise ValueError(f"gsm8k: expected --set FIELD=VALUE, found {bare}. Write e.g. --set core=gain.")
    given["fields"] = tuple((name, _value(text)) for name, _, text in (word.partition("=") for word in o.set))
    return published(o.table, **({"steps": 8, "rate": 5e-3} if o.probe else {}) | given)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a bare word


def main() -> None:
    """Run or probe, print and, for a run, write a results file."""
    o = options()
    try:
        s = settings_of(o)
        config(s)
    except (ValueError, TypeError) as e:
        raise SystemExit(str(e)) from e
    if o.probe:
        row = probe(s, o.out)
        print("\n".join(f"{name:16} {value:.4g}" if isinstance(value, float) else f"{name:16} {value}" for name, value in row.items()))
        return
    found = run(s, o.out)
    print(f"{s.variant}: {found['test']['exact']:.1%} ± {found['test']['error']:.1%} of {found['test']['n']} test problems")
    write(f"gsm8k-{run_name(s)}", machine(torch.get_num_threads(), where=device()), found)


if __name__ == "__main__":
    main()
