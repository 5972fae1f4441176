"""Train on MetaMathQA, test on GSM8K: the lineage's own measure, on any causal language model of the Hub or of a folder.

`--table` takes the settings of one of the two tables that wassname/lora-lite published; options change them one by one. A run that was
stopped goes on where it was when it is started again. `--probe` takes a few steps on one batch and prints a row of facts.

    python bench/gsm8k.py --variant lora                               # Qwen3-0.6B-Base, q and v, 5000 steps of 4
    python bench/gsm8k.py --variant dora --table qwen3.5               # Qwen3.5-0.8B-Base, down_proj, 2500 steps of 8
    python bench/gsm8k.py --variant antipasto --set core=gain basis=corda --table qwen3.5
    python bench/gsm8k.py --variant hra --probe --steps 8 --rate 5e-3
"""

import argparse
import ast
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from common import device, machine, write
from finetune import costs, evaluate, gradients, load_model, norm, start, train, training_examples
from gsm8k_settings import RATES, TABLES, TARGETS, Settings
from metamath import batch, read


def run(s: Settings, out: Path) -> dict[str, Any]:
    """Train and test one variant, with everything that a stopped run needs in `out`; give its results."""
    folder = out / run_name(s)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(s, device())
    data = training_examples(s, tokenizer)
    begin = time.perf_counter()
    adapt = start(s, model, data, tokenizer.pad_token_id, folder / "adapter.safetensors")
    seconds = time.perf_counter() - begin
    cost = costs(adapt, adapt.init(seed=s.seed), model, batch(data[: s.rows], tokenizer.pad_token_id, model.device))
    params, losses = train(s, adapt, data, tokenizer.pad_token_id, folder / "state.safetensors")
    ll.save(adapt, params, folder / "adapter.safetensors")
    module = adapt.module(params).eval()
    valid = read(s.test_data, "train", "main").shuffle(seed=s.seed)
    test = read(s.test_data, "test", "main")
    splits = {"valid": valid.select(range(min(s.valid, len(valid)))), "test": test.select(range(min(s.test or len(test), len(test))))}
    found = {name: evaluate(s, module, tokenizer, rows, folder / f"{name}.jsonl") for name, rows in splits.items()}
    facts = {"params": adapt.num_params, "macs_per_token": adapt.macs_per_token, "init_seconds": seconds, **cost}
    return {"settings": dataclasses.asdict(s), **found, **facts, "first_loss": losses[0], "last_loss": losses[-1]}


def run_name(s: Settings) -> str:
    """Name a run's folder."""
    own = "".join(f"-{k}={v}" for k, v in s.fields)
    model = Path(s.model).name if Path(s.model).is_dir() else s.model  # a folder's place says nothing
    return re.sub(r"[^\w.=-]+", "--", f"{model}-{s.variant}{own}-{s.steps}x{s.rows * s.accumulate}-seed{s.seed}")


def probe(s: Settings, out: Path) -> dict[str, Any]:
    """Train a few steps on one fixed batch and give a row of facts about the adapter.

    Raises:
        SystemExit: where a perturbation has no effect, the loss does not fall, a base weight got a gradient, or reloading changes logits.
    """
    model, tokenizer = load_model(s, device())
    short = dataclasses.replace(s, steps=1, accumulate=1)
    rows = batch(training_examples(short, tokenizer), tokenizer.pad_token_id, model.device)
    out.mkdir(parents=True, exist_ok=True)
    place = out / f"probe-{s.variant}.safetensors"
    place.unlink(missing_ok=True)
    adapt = start(s, model, training_examples(short, tokenizer), tokenizer.pad_token_id, place)
    params = adapt.init(seed=s.seed)
    begin = ll.tree_map(torch.clone, params)
    with torch.no_grad():
        base, fresh = adapt.base(rows, use_cache=False).logits, adapt(params, rows, use_cache=False).logits
        perturbed = adapt(ll.tree_map(lambda p: p + 0.25, params), rows, use_cache=False).logits
    leaves = ll.tree_leaves(params)
    adam = torch.optim.AdamW(leaves, lr=s.rate)
    losses, norms = [], []
    for _ in range(s.steps):
        loss, grads = gradients(adapt, params, [rows])
        losses.append(loss)
        norms.append(norm(grads))
        for leaf, grad in zip(leaves, ll.tree_leaves(grads), strict=True):
            leaf.grad = grad
        adam.step()
    losses.append(gradients(adapt, params, [rows])[0])
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
    """Refuse a row that shows a broken adapter."""
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
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the variant's config")
    parser.add_argument("--out", type=Path, default=Path("outputs/gsm8k"), help="where the run is kept")
    for field in dataclasses.fields(Settings):
        if field.name != "fields":
            kind = int if field.name in ("test", "valid") else type(field.default)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"default {field.default} (table qwen3)")
    return parser.parse_args()


def settings_of(o: argparse.Namespace) -> Settings:
    """Give the table's settings with the variant's rate and targets, changed by the options."""
    given = {f.name: getattr(o, f.name) for f in dataclasses.fields(Settings) if f.name != "fields"}
    given = {name: value for name, value in given.items() if value is not None}
    variant = given.get("variant", "lora")
    own = {"rate": RATES.get(variant, 1e-4), "targets": TARGETS.get(variant, TABLES[o.table].targets)}
    if o.probe:
        own |= {"steps": 8, "rate": 5e-3}
    pairs = [word.partition("=")[::2] for word in o.set]
    return dataclasses.replace(TABLES[o.table], **own | given, fields=tuple((name, _value(text)) for name, text in pairs))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a bare word


def main() -> None:
    """Run or probe, print and, for a run, write a results file."""
    o = options()
    s = settings_of(o)
    if o.probe:
        row = probe(s, o.out)
        print("\n".join(f"{name:16} {value:.4g}" if isinstance(value, float) else f"{name:16} {value}" for name, value in row.items()))
        return
    results = run(s, o.out)
    print(f"{s.variant}: {results['test']['exact']:.1%} ± {results['test']['error']:.1%} of {results['test']['n']} test problems")
    write(f"gsm8k-{run_name(s)}", machine(torch.get_num_threads()), results)


if __name__ == "__main__":
    main()
