"""A variant and PEFT's same method on one model, with the same numbers in both, checked against each other before anything is timed."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lora_lite as ll
from common import moved
from pairs import Pair, build, peft_model
from timing import Call

TOLERANCE = 1e-2  # of the largest change that the adapter makes to a logit; float32


class Contender(NamedTuple):
    """What is timed: our function with its params, PEFT's model with what it trains, and how their outputs were checked."""

    adapt: ll.Adapt
    params: Any
    theirs: nn.Module | None
    trained: Sequence[Tensor]
    checked: dict[str, Any]


def contender(model: nn.Module, pair: Pair, batch: Mapping[str, Any]) -> Contender:
    """Build both sides. Params are moved off their start; ours are PEFT's own wherever its files can be read.

    Raises:
        SystemExit: where outputs are not finite, do not differ from the base's, or differ from PEFT's.
    """
    if pair.peft is None:
        return _alone(model, pair, batch)
    theirs, trained = peft_model(model, pair.peft, [batch])
    bare = theirs.get_base_model()  # without PEFT's outermost wrapper, which is no part of the method
    read = _read(model, pair, theirs, trained, batch)
    if read is None:
        return _alone(model, pair, batch)._replace(theirs=bare, trained=trained)
    return Contender(*read, bare, trained, _check(pair, model, *read, batch, bare))


def _alone(model: nn.Module, pair: Pair, batch: Mapping[str, Any]) -> Contender:
    adapt = build(model, pair.cfg, [batch])
    params = moved(adapt.init(seed=0))
    return Contender(adapt, params, None, (), _check(pair, model, adapt, params, batch))


@torch.no_grad()
def _read(model: nn.Module, pair: Pair, theirs: Any, trained: Sequence[Tensor], batch: Mapping[str, Any]) -> tuple[ll.Adapt, Any] | None:
    """Move PEFT's tensors and read them as ours; None where PEFT's file does not hold the method, as with CorDA's changed base."""
    generator = torch.Generator().manual_seed(3)
    for p in trained:
        p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        try:
            adapt, params = ll.from_peft(model, folder)
        except ValueError:
            return None
    if adapt.configs[0].name == pair.cfg.name:
        return adapt, params
    ours = build(model, pair.cfg, [batch])  # EVA, which PEFT's file calls LoRA: the same tensors
    return (ours, params) if ours.shapes == adapt.shapes else None


@torch.no_grad()
def _check(
    pair: Pair, model: nn.Module, adapt: ll.Adapt, params: Any, batch: Mapping[str, Any], theirs: nn.Module | None = None
) -> dict[str, Any]:
    base, ours = model(**batch).logits, adapt(params, batch).logits
    change = float((ours - base).abs().max())
    if not ours.isfinite().all() or change == 0.0:
        raise SystemExit(f"bench: expected finite logits of {pair.cfg.name} that differ from the base's, found others.")
    if theirs is None:
        return {"against": "base", "change": change}
    error = float((ours - theirs(**batch).logits).abs().max()) / change
    if error > TOLERANCE:
        raise SystemExit(f"bench: expected {pair.cfg.name} to give PEFT's output, found {error:.1e} of the adapter's change apart.")
    return {"against": "peft", "change": change, "error": error}


def forwards(model: nn.Module, c: Contender, batch: Mapping[str, Any]) -> dict[str, Call]:
    """Give the forward pass of the frozen base, ours and PEFT's, without a graph."""
    calls: dict[str, Any] = {"frozen": lambda: model(**batch).logits, "ours": lambda: c.adapt(c.params, batch).logits}
    if c.theirs is not None:
        calls["peft"] = lambda: c.theirs(**batch).logits
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def steps(model: nn.Module, c: Contender, batch: Mapping[str, Any]) -> dict[str, Call]:
    """Give one training step, forward and backward, of the frozen base (to its input), ours and PEFT's.

    Raises:
        SystemExit: where a gradient of ours is not finite, or all are zero.
    """
    step = ll.value_and_grad(lambda p: c.adapt(p, batch).loss)
    grads = ll.tree_leaves(step(c.params)[1])
    if not all(g.isfinite().all() for g in grads) or not any(g.any() for g in grads):
        raise SystemExit(f"bench: expected finite gradients of {c.adapt.configs[0].name} that are not all zero, found others.")
    calls: dict[str, Call] = {"frozen": lambda: frozen_step(model, batch), "ours": lambda: step(c.params)}
    if c.theirs is not None:
        calls["peft"] = lambda: torch.autograd.grad(c.theirs(**batch).loss, list(c.trained), allow_unused=True)
    return calls


def frozen_step(model: Any, batch: Mapping[str, Any]) -> Any:
    """Run the frozen base forward, and backward to its input: the least that a training step could cost."""
    rows = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    return torch.autograd.grad(model(inputs_embeds=rows, labels=batch["labels"], use_cache=False).loss, rows)
