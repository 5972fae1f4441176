"""Time compiled variants beside the compiled base and PEFT's same method, compiled too. A part of what `speed.py` measures."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

import lora_lite as ll
from common import batch_of, llama
from contenders import contender
from pairs import pairs
from timing import Call, interleaved, ratio


def compiled(width: int, r: int, names: Iterable[str], repeats: int) -> dict[str, Any]:
    """Compile a model of one block: forward and step of ours over the compiled base's, over PEFT's, and over ours in eager mode."""
    model = llama(width, 1)
    batch = batch_of(4, 64)
    rows = {name: _one(model, batch, pairs(r)[name]) for name in tqdm(list(names), desc="compiled", mininterval=5)}
    found = {n: _ratios(calls, took, repeats) for n, (calls, took) in rows.items()}
    return {"width": width, "layers": 1, "rows": 4, "tokens": 64, "r": r, "variants": found}


def _one(model: Any, batch: dict[str, Any], pair: Any) -> tuple[dict[str, Call], dict[str, float]]:
    """Give the calls, compiled, and the seconds that each took to compile; the step of ours is checked against eager mode."""
    torch.compiler.reset()
    c = contender(model, pair, batch)
    rows = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    base = torch.compile(lambda rows: model(inputs_embeds=rows, labels=batch["labels"], use_cache=False).loss)
    loss = torch.compile(lambda p: c.adapt(p, batch).loss, fullgraph=True)
    leaves = {path: {n: t.detach().clone().requires_grad_() for n, t in tree.items()} for path, tree in c.params.items()}
    eager = ll.value_and_grad(lambda p: c.adapt(p, batch).loss)
    calls: dict[str, Call] = {
        "frozen": lambda: torch.autograd.grad(base(rows), rows),
        "ours": lambda: torch.autograd.grad(loss(leaves), ll.tree_leaves(leaves)),
        "eager": lambda: eager(c.params),
    }
    if c.theirs is not None:
        theirs = torch.compile(lambda: c.theirs(**batch).loss)
        calls["peft"] = lambda: torch.autograd.grad(theirs(), list(c.trained), allow_unused=True)
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    for a, b in zip(calls["ours"](), ll.tree_leaves(calls["eager"]()[1]), strict=True):
        if not torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()) + 1e-7):
            raise SystemExit(f"bench: expected the compiled step of {pair.cfg.name} to give the eager gradients, found others.")
    return calls, seconds


def _ratios(calls: dict[str, Call], seconds: dict[str, float], repeats: int) -> dict[str, Any]:
    times = interleaved(calls, repeats)
    found = {f"over_{name}": ratio(times, "ours", name) for name in ("frozen", "peft", "eager") if name in times}
    return {**found, "compile_seconds": seconds}
