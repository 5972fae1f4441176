"""One step of many adapters in a mixed batch, against a loop over them: a part of what `speed.py` measures."""

from typing import Any

import torch

import lora_lite as ll
from common import batch_of, interleaved, llama, moved, pairs, ratios


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
    batch, params = batch_of(16, 16), moved(adapt.init())
    by_row = ll.per_example_grad(adapt, _row_losses)

    def one_by_one() -> Any:
        rows = [{"input_ids": row[None], "use_cache": False} for row in batch["input_ids"]]
        return [ll.value_and_grad(lambda p, b=b: _row_losses(adapt(p, b), b).sum())(params)[1] for b in rows]

    _agree(by_row(params, batch), one_by_one())
    times = interleaved({"by row": lambda: by_row(params, batch), "loop": one_by_one}, repeats)
    return {**found, "gradients of 16 rows of 16 tokens": ratios(times, "loop")["by row"]}


def _row_losses(output: Any, batch: Any) -> torch.Tensor:
    logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def _agree(stacked: Any, trees: list[Any]) -> None:
    for member, tree in zip(ll.unstack(stacked), trees):
        for a, b in zip(ll.tree_leaves(member), ll.tree_leaves(tree)):
            if float((a - b).abs().max()) > 1e-5:
                raise SystemExit("speed: expected the step of many adapters to equal the loop, found other gradients.")
