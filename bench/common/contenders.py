"""A variant and PEFT's same method on one model, with the same numbers in both, held against each other before anything is measured."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lora_lite as ll
from common.measure import Call, moved
from common.methods import Pair

TOLERANCE = 1e-2  # of the largest change that the adapter makes to a logit; float32


def build(model: nn.Module, cfg: ll.AdapterConfig, batches: Sequence[Mapping[str, Any]]) -> ll.Adapt:
    """Adapt the model by a variant; one that is calibrated sees the batches."""
    return ll.build(model, cfg, calibration=batches if cfg.calibrated else None, progress=False)


def peft_model(model: nn.Module, config: peft.PeftConfig, batches: Sequence[Mapping[str, Any]] = ()) -> tuple[Any, list[nn.Parameter]]:
    """Return PEFT's model over a copy of the base, and its trained parameters."""
    return wrapped(copy.deepcopy(model), config, batches)


def wrapped(base: nn.Module, config: peft.PeftConfig, batches: Sequence[Mapping[str, Any]]) -> tuple[Any, list[nn.Parameter]]:
    """Let PEFT adapt the base in place, with the calibration that the method needs; return its model and trained parameters."""
    start, mode = getattr(config, "init_lora_weights", None), base.training
    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda  # here, since it imports attrs, which PEFT does not declare

        preprocess_corda(base, config, run_model=lambda: _run(base, batches))
    if start == "lora_ga":
        preprocess_loraga(base.requires_grad_(), config, train_step=lambda: [base(**b).loss.backward() for b in batches])
    adapted = peft.get_peft_model(base, config, low_cpu_mem_usage=start == "eva")  # PEFT's own advice for EVA
    if start == "eva":
        tensors = [{name: value for name, value in batch.items() if torch.is_tensor(value)} for batch in batches]
        peft.initialize_lora_eva_weights(adapted, tensors, show_progress_bar=False)
        adapted.train(mode)  # which it leaves in training mode, dropout and all
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


@torch.no_grad()
def _run(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    for batch in batches:
        for ids in batch["input_ids"]:
            model(input_ids=ids[None])  # PEFT's CorDA takes one row at a time


class Contender(NamedTuple):
    """Both sides of a measurement: our function with its params, PEFT's model with its trained parameters, the check of their outputs."""

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
    read = same_numbers(model, pair, theirs, trained, [batch])
    if read is None:
        return _alone(model, pair, batch)._replace(theirs=bare, trained=trained)
    adapt, params = read
    with torch.no_grad():
        # In evaluation: some methods draw while they train, each side by itself.
        outputs = (f(**batch).logits for f in (model, lambda **kw: adapt.eval()(params, kw), bare.eval()))
        checked = check(pair.cfg.name, *outputs)
    return Contender(adapt, params, bare.train(), trained, checked)


def _alone(model: nn.Module, pair: Pair, batch: Mapping[str, Any]) -> Contender:
    adapt = build(model, pair.cfg, [batch])
    params = moved(adapt.init(seed=0))
    with torch.no_grad():
        checked = check(pair.cfg.name, model(**batch).logits, adapt(params, batch).logits)
    return Contender(adapt, params, None, (), checked)


@torch.no_grad()
def same_numbers(
    model: nn.Module, pair: Pair, theirs: Any, trained: Sequence[Tensor], batches: Sequence[Mapping[str, Any]] = ()
) -> tuple[ll.Adapt, Any] | None:
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
    ours = build(model, pair.cfg, batches)  # EVA, which PEFT's file calls LoRA: the same tensors
    return (ours, params) if ours.shapes == adapt.shapes else None


def check(name: str, base: Tensor, ours: Tensor, theirs: Tensor | None = None) -> dict[str, Any]:
    """Hold an output of ours against the base's, from which it must differ, and PEFT's, which it must equal.

    Raises:
        SystemExit: where it does not.
    """
    change = float((ours - base).abs().max())
    if not ours.isfinite().all() or change == 0.0:
        raise SystemExit(f"bench: expected finite logits of {name} that differ from the base's, found others.")
    if theirs is None:
        return {"against": "base", "change": change}
    error = float((ours - theirs).abs().max()) / change
    if error > TOLERANCE:
        raise SystemExit(f"bench: expected {name} to give PEFT's output, found {error:.1e} of the adapter's change apart.")
    return {"against": "peft", "change": change, "error": error}


def forwards(model: nn.Module, c: Contender, batch: Mapping[str, Any]) -> dict[str, Call]:
    """Return the forward pass of the frozen base, ours and PEFT's, without a graph."""
    calls: dict[str, Any] = {"frozen": lambda: model(**batch).logits, "ours": lambda: c.adapt(c.params, batch).logits}
    if c.theirs is not None:
        calls["peft"] = lambda: c.theirs(**batch).logits
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def steps(model: nn.Module, c: Contender, batch: Mapping[str, Any]) -> dict[str, Call]:
    """Return one training step, forward and backward, of the frozen base (to its input), ours and PEFT's.

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
