"""The training of `gsm8k.py`: load, build, train from where it was, and its state as one safetensors file.

A state is any nesting of dicts and lists of tensors, numbers, strings and None. Tensors go into the file by number; a skeleton in its
header says where each belongs. Nothing is unpickled. The file is written beside its place and renamed, so that a run that is stopped at any
moment leaves a whole one.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import lora_lite as ll
from common.captured import WIDTHS, Captured
from common.contenders import frozen_step
from common.gsm8k_data import CALIBRATED, CALIBRATION, Example, Settings, batch, config, examples, read, reason
from common.measure import interleaved, milliseconds, peak_bytes
from common.methods import METHODS
from common.pretrained import SMOLLM, smollm_folder
from lora_lite.variants.adalora import orthogonality

Step = Callable[[Any, Mapping[str, Any]], tuple[Tensor, Any]]
ROUNDS = 5
"""Rounds of the times of a step."""
STATE, ADAPTER = "state.safetensors", "adapter.safetensors"


def load_model(s: Settings, where: torch.device) -> tuple[Any, Any]:
    """Load the model, in evaluation mode, and its tokenizer, padded left with its end token. SmolLM2-135M-Instruct comes out of a package.

    Raises:
        ValueError: where there is no such model, or its tokenizer has no end token.
    """
    place = smollm_folder() if s.model == SMOLLM else s.model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, s.dtype)).to(where).eval()
    except (OSError, ValueError, KeyError) as e:  # transformers' answers to a wrong name and to another kind of model
        raise ValueError(
            f'gsm8k: expected a causal language model and its tokenizer, of the Hub or a folder, at "{s.model}", '
            f"found none ({reason(e)}). Correct --model."
        ) from None  # their own chain is long
    if tokenizer.eos_token is None:
        raise ValueError(f'gsm8k: expected a tokenizer with an end token at "{s.model}", found none. Answers end with it; use another.')
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return model, tokenizer


def training_examples(s: Settings, tokenizer: Any) -> list[Example]:
    """Return the examples that the run trains on, in their order."""
    rows = read(s.train_data, "train", ("query", "response")).shuffle(seed=s.seed)
    return examples(tokenizer, rows, s.longest, s.steps * s.accumulate * s.rows)


def build(s: Settings, model: Any, data: Sequence[Example], pad: int) -> ll.Adapt:
    """Return the run's `adapt`, calibrated on the first examples where the variant needs it."""
    cfg, count = config(s), CALIBRATION.get(s.variant, CALIBRATED)
    parts = [data[k : k + s.rows] for k in range(0, min(len(data), count * s.rows), s.rows)]
    return ll.build(model, cfg, calibration=(batch(part, pad, model.device) for part in parts) if cfg.calibrated else None)


def start(
    s: Settings, model: Any, data: Sequence[Example], pad: int, folder: Path, facts: Mapping[str, Any] | None = None
) -> tuple[ll.Adapt, dict[str, Any]]:
    """Return the `adapt` of a run and the state of its training: as they were kept in `folder`, or new ones, which are kept there.

    The costs are measured unless `facts` are given, for a machine that is busy with other runs.

    Raises:
        ValueError: where the folder's run has other settings.
    """
    place, adapter = folder / STATE, folder / ADAPTER
    if place.is_file():
        state = load_state(place)
        require_same(state["settings"], s, folder)
        return ll.load(model, adapter)[0], state
    adapt, measured = prepare(s, model, data, pad, facts is None)
    params, update = adapt.init(seed=s.seed), METHODS[s.variant].state(adapt)
    state = {"settings": asdict(s), "facts": facts or measured, "params": params, "adam": None, "update": update, "losses": []}
    folder.mkdir(parents=True, exist_ok=True)
    for answers in folder.glob("*.jsonl"):
        answers.unlink()  # of a run whose state was removed
    ll.save(adapt, params, adapter)
    save_state(place, state)
    return adapt, state


def prepare(s: Settings, model: Any, data: Sequence[Example], pad: int, measure: bool = True) -> tuple[ll.Adapt, dict[str, Any]]:
    """Return the run's `adapt` and, if asked to measure, its facts: the seconds of its start and the costs of a step."""
    begin = time.perf_counter()
    adapt = build(s, model, data, pad)
    params = adapt.init(seed=s.seed)
    seconds = time.perf_counter() - begin
    if not measure:
        return adapt, {}
    return adapt, {"init_seconds": seconds, **costs(adapt, params, model, batch(data[: s.rows], pad, model.device))}


def gradients(step: Step, params: Any, parts: Sequence[Mapping[str, Any]]) -> tuple[float, Any]:
    """Return the mean loss of several passes and the mean gradients; `step` is that of `step_of`."""
    total, grads = 0.0, None
    for rows in parts:
        loss, new = step(params, rows)
        total += float(loss) / len(parts)
        grads = new if grads is None else ll.tree_map(torch.add, grads, new)
    return total, ll.tree_map(lambda g: g / len(parts), grads) if len(parts) > 1 else grads


def step_of(adapt: ll.Adapt) -> Step:
    """Return the function of `(params, rows)` to the loss and the gradients of the objective, which for AdaLoRA has a penalty besides."""
    weight = getattr(adapt.configs[0], "orth_reg_weight", 0.0)

    def objective(p: Any, rows: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        loss = adapt(p, rows, use_cache=False).loss
        return loss + weight * orthogonality(p) if weight else loss, loss.detach()

    both = ll.value_and_grad(objective, has_aux=True)

    def step(params: Any, rows: Mapping[str, Any]) -> tuple[Tensor, Any]:
        (_, loss), grads = both(params, rows)
        return loss, grads

    return step


def norm(tree: Any) -> float:
    """Return the Euclidean norm of all leaves together."""
    return math.sqrt(sum(float(leaf.detach().float().square().sum()) for leaf in ll.tree_leaves(tree)))


def train(
    s: Settings, adapt: ll.Adapt, data: Sequence[Example], pad: int, state: dict[str, Any], folder: Path, every: int = 100
) -> tuple[Any, list[float]]:
    """Train from a state on, which is kept in `folder` every so many steps; give the params and the loss of each step.

    Raises:
        ValueError: where a loss or a gradient is not finite, before anything takes it up.
    """
    adapt = adapt.train()
    params = ll.tree_map(lambda new, kept: kept.to(new.device, copy=True), adapt.init(seed=s.seed), state["params"])
    leaves, losses, where = ll.tree_leaves(params), list(state["losses"]), ll.tree_leaves(params)[0].device
    plain = step_of(adapt)
    captured = Captured(plain) if where.type == "cuda" and s.accumulate == 1 else None
    adam, update = torch.optim.AdamW(leaves, lr=s.rate, weight_decay=0.1), to_device(state["update"], where)
    if state["adam"] is not None:
        adam.state.update({leaf: moments for leaf, moments in zip(leaves, to_device(state["adam"], where), strict=True)})
    for step in (bar := tqdm(range(len(losses), s.steps), initial=len(losses), total=s.steps, desc=f"train {s.variant}", mininterval=5)):
        torch.manual_seed(s.seed + step)  # dropout, where there is any: the same whether the run was stopped or not
        first = step * s.accumulate * s.rows
        starts = range(first, first + s.accumulate * s.rows, s.rows)
        parts = [batch(data[k : k + s.rows], pad, where, multiple=WIDTHS if captured else 1) for k in starts]
        loss, grads = gradients(captured or plain, params, parts)
        adam.param_groups[0]["lr"] = s.rate * 0.5 * (1 + math.cos(math.pi * step / s.steps))
        ll.set_grads(params, grads)
        size = float(torch.nn.utils.clip_grad_norm_(leaves, 1.0))
        if not math.isfinite(loss + size):
            raise ValueError(
                f"gsm8k: expected a finite loss and gradients in step {step} of {s.variant}, found a loss of {loss} and gradients of norm "
                f"{size}. Lower --rate, or use --dtype float32."
            )
        adam.step()
        updated, update = adapt.configs[0].update(params, grads, update)
        with torch.no_grad():
            ll.tree_map(lambda p, new: p if new is p else p.copy_(new), params, updated)
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if len(losses) % every == 0 or len(losses) == s.steps:
            now = {"params": params, "adam": [adam.state[leaf] for leaf in leaves], "update": update, "losses": losses}
            save_state(folder / STATE, {**state, **now})
    if captured and captured.failed:
        tqdm.write(f"{s.variant}: not all steps were CUDA graphs: {captured.failed}")
    return params, losses


def to_device(state: Any, where: torch.device) -> Any:
    """Move the tensors of a state that was read; a step's count stays on the CPU, where AdamW keeps it."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(where) if t.dim() else t, state)


def require_same(kept: Mapping[str, Any], s: Settings, folder: Path) -> None:
    """Raise unless a kept run has these settings; how many problems are answered may differ."""
    now = json.loads(json.dumps(asdict(s)))
    other = sorted(k for k in now if now[k] != kept.get(k) and k not in ("valid", "test"))
    if other:
        found = ", ".join(f"{k}={kept.get(k)!r} instead of {now[k]!r}" for k in other)
        raise ValueError(f'gsm8k: expected the run in "{folder}" to be this one, found {found}. Use another --out, or remove the folder.')


def costs(adapt: ll.Adapt, params: Any, model: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the time of a forward pass and of a step on one batch, ours and the frozen model's, in milliseconds, and the step's peak."""

    both = step_of(adapt)

    def step() -> Any:
        return gradients(both, params, [rows])

    calls = {"forward": torch.no_grad()(lambda: adapt(params, rows, use_cache=False)), "step": step}
    calls["frozen step"] = lambda: frozen_step(model, rows)
    times = interleaved(calls, ROUNDS, where=model.device)
    return {"ms": {name: milliseconds(values) for name, values in times.items()}, "peak_bytes": peak_bytes(step)}


TENSOR = "tensor"


def save_state(path: Path, state: Any) -> None:
    """Write a state to a file, all or nothing."""
    tensors: dict[str, Tensor] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().contiguous().clone()  # leaves may share storage, which the format refuses
            return {TENSOR: str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {"dict": {k: skeleton(v) for k, v in value.items()}}
        return [skeleton(v) for v in value] if isinstance(value, list | tuple) else value

    beside = path.with_name(f".{path.name}.tmp")
    header = {"state": json.dumps(skeleton(state))}
    try:
        safetensors.torch.save_file(tensors, beside, header)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_state(path: Path) -> Any:
    """Read a state that `save_state` wrote. Tuples come back as lists."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["state"]  # noqa: SIM118  # no mapping

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[TENSOR]] if TENSOR in value else {k: filled(v) for k, v in value["dict"].items()}
        return [filled(v) for v in value] if isinstance(value, list) else value

    return filled(json.loads(header))
