"""One step of many adapters in a mixed batch, against a loop over them: a part of what `speed.py` measures."""

from typing import Any

import torch

import lora_lite as ll
from common import batch_of, llama, moved
from pairs import pairs
from peak import peak_bytes
from timing import interleaved, ratios


def populations(width: int, layers: int, r: int, repeats: int) -> dict[str, Any]:
    """Time one step of many adapters, and gradients by row, against a loop over them: two threads, LoRA on all linear layers."""
    model = llama(width, layers)
    adapt = ll.build(model, pairs(r)["lora"][0])
    found = {}
    for members, tokens in ((32, 16), (8, 32)):
        batch = batch_of(members, tokens)
        ids = batch["input_ids"]
        trees = [moved(adapt.init(seed=k)) for k in range(members)]
        stacked = ll.stack(trees)

        def together(stacked: Any = stacked, batch: Any = batch) -> Any:
            return ll.value_and_grad(lambda p: _row_losses(adapt.mixed(p, batch), batch).sum())(stacked)

        def loop(trees: Any = trees, ids: Any = ids) -> Any:
            one = [{"input_ids": row[None], "use_cache": False} for row in ids]
            return [ll.value_and_grad(lambda p, b=b: _row_losses(adapt(p, b), b).sum())(tree) for tree, b in zip(trees, one)]

        _agree(together()[1], [grads for _, grads in loop()])
        found[f"{members} members of {tokens} tokens"] = ratios(interleaved({"together": together, "loop": loop}, repeats), "loop")[
            "together"
        ]
    return {**found, **rows_apart(adapt, repeats)}


def rows_apart(adapt: ll.Adapt, repeats: int) -> dict[str, Any]:
    """Time gradients by row against a loop and a whole-model `vmap`, and give the peak bytes of each, and of the norms alone."""
    batch, params = batch_of(16, 16), moved(adapt.init())
    ids = batch["input_ids"]

    def loss_of(p: Any, row: Any) -> torch.Tensor:
        one = {"input_ids": row[None], "use_cache": False}
        return _row_losses(adapt(p, one), one).sum()

    calls = {
        "mixed": lambda: ll.per_example_grad(adapt, _row_losses)(params, batch),
        "vmap": lambda: torch.vmap(torch.func.grad(loss_of), (None, 0))(params, ids),
        "loop": lambda: ll.stack([ll.value_and_grad(lambda p, row=row: loss_of(p, row))(params)[1] for row in ids]),
    }
    each = ll.unstack(calls["loop"]())
    for name in ("mixed", "vmap"):
        _agree(calls[name](), each)
    times = interleaved(calls, repeats)
    norms = {
        "mixed, norms": lambda: ll.per_example_norm(adapt, _row_losses)(params, batch),
        "mixed, norms, four rows at a time": lambda: ll.per_example_norm(adapt, _row_losses, chunk_size=4)(params, batch),
    }
    peaks = {name: peak_bytes(call) for name, call in {**calls, **norms}.items()}
    what = "gradients of 16 rows of 16 tokens"
    return {
        what: {**ratios(times, "loop")["mixed"], "over_vmap": ratios(times, "vmap")["mixed"], "peak_bytes": peaks},
        f"{what}, by vmap of the whole model": ratios(times, "loop")["vmap"],
    }


def _row_losses(output: Any, batch: Any) -> torch.Tensor:
    logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def _agree(stacked: Any, trees: list[Any]) -> None:
    for member, tree in zip(ll.unstack(stacked), trees):
        for a, b in zip(ll.tree_leaves(member), ll.tree_leaves(tree)):
            if float((a - b).abs().max()) > 1e-5:
                raise SystemExit("speed: expected the step of many adapters to equal the loop, found other gradients.")
