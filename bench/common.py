"""What the benchmarks share: the model, the batch, facts about the machine, results files."""

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lora_lite as ll
from processes import without_rounds
from timing import device

RESULTS = Path(__file__).parent / "results"
QUICK = RESULTS / "quick"  # what --quick writes: shows that all works, never a figure of the documentation


def llama(width: int, layers: int, vocab: int = 512) -> transformers.LlamaForCausalLM:
    """Build a Llama with random frozen weights where the benchmarks run: width in features, eight heads at most."""
    torch.manual_seed(0)
    heads = min(8, width // 8)
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64 or 2 * width, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=vocab, num_attention_heads=heads, num_key_value_heads=heads, **sizes)
    return transformers.LlamaForCausalLM(config).requires_grad_(False).to(device())


def batch_of(rows: int, tokens: int, vocab: int = 512) -> dict[str, Any]:
    """Draw a batch of token ids that are their own labels."""
    ids = torch.randint(vocab, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device())
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def sizes_of(table: Mapping[str, Mapping[str, int]], o: argparse.Namespace) -> dict[str, int]:
    """Give the sizes of a run, of a table's rows for `quick` and each sort of device, but those that the options give."""
    return {name: getattr(o, name, None) or value for name, value in table["quick" if o.quick else device().type].items()}


def moved(params: dict[str, dict[str, torch.Tensor]], scale: float = 0.01) -> dict[str, dict[str, torch.Tensor]]:
    """Move params off their start, where most variants are the identity."""
    g = torch.Generator().manual_seed(2)
    return {p: {n: t + scale * torch.randn(t.shape, generator=g).to(t) for n, t in leaves.items()} for p, leaves in params.items()}


def machine(threads: int, processes: int = 1, where: torch.device | None = None) -> dict[str, Any]:
    """Name what the figures depend on: commit, versions, class of machine, threads, fresh processes that were pooled.

    `where` is the device that was measured, a CPU if not given.
    """
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, ll)}
    gpu = where is not None and where.type == "cuda"
    kind = torch.cuda.get_device_name(where) if gpu else f"{os.cpu_count()}-core {platform.machine()} CPU"
    counts = {"device": "cuda" if gpu else "cpu", "threads": threads, "processes": processes}
    return {"commit": _commit(), "versions": versions, "machine": kind, **counts, "python": platform.python_version()}


def _commit() -> str:
    """Give the short commit, marked where the code that is measured has been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent.parent, check=False).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+changes" if commit and git("status", "--porcelain", "--", "src", ":(glob)bench/*.py") else "") or "none"
    except FileNotFoundError:  # no git here
        return "none"


def write(name: str, facts: dict[str, Any], results: dict[str, Any], quick: bool = False) -> Path:
    """Write a results file, dated and named by commit and kind, on a GPU `<kind>-cuda`, and say so."""
    date = datetime.date.today().isoformat()
    folder = QUICK if quick else RESULTS
    folder.mkdir(exist_ok=True, parents=True)
    kind = f"{name}-cuda" if facts.get("device") == "cuda" else name  # never in the place of a CPU's
    path = folder / f"{date}-{facts['commit']}-{kind}.json"
    path.write_text(json.dumps({"date": date, **facts, "results": without_rounds(results)}, indent=1) + "\n", "utf-8")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}", flush=True)
    return path
