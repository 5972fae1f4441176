"""One run of `gsm8k.py`: load, build, train from where it was, answer, score. Everything that takes long is kept as it comes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import lora_lite as ll
from checkpoint import load_state, save_state
from contenders import frozen_step
from gsm8k_settings import CALIBRATION, Settings, config
from metamath import PROMPT, Example, batch, examples, read, right
from peak import peak_bytes
from timing import interleaved, spread


def load_model(s: Settings, where: torch.device) -> tuple[Any, Any]:
    """Load the model, in evaluation mode, and its tokenizer, padded left with its end token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(s.model)
    if tokenizer.eos_token is None:
        raise ValueError(f"gsm8k: expected a tokenizer with an end token at {s.model}, found none. Answers end with it; use another.")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=getattr(torch, s.dtype)).to(where).eval(), tokenizer


def training_examples(s: Settings, tokenizer: Any) -> list[Example]:
    """Give the examples that the run trains on, in their order."""
    rows = read(s.train_data, "train").shuffle(seed=s.seed)
    return examples(tokenizer, rows, s.longest, s.steps * s.accumulate * s.rows)


def start(s: Settings, model: Any, data: Sequence[Example], pad: int, place: Path) -> ll.Adapt:
    """Give the `adapt` of a run: built, with calibration where the variant needs it, or read from where it was kept."""
    if place.is_file():
        return ll.load(model, place)[0]
    cfg = config(s)
    count = CALIBRATION.get(s.variant, 64)
    parts = [data[k : k + s.rows] for k in range(0, min(len(data), count * s.rows), s.rows)]
    adapt = ll.build(model, cfg, calibration=(batch(part, pad, model.device) for part in parts) if cfg.calibrated else None)
    ll.save(adapt, adapt.init(seed=s.seed), place)
    return adapt


def gradients(adapt: ll.Adapt, params: Any, parts: Sequence[Mapping[str, Any]]) -> tuple[float, Any]:
    """Give the mean loss and gradients of several passes."""
    step = ll.value_and_grad(lambda p, rows: adapt(p, rows, use_cache=False).loss / len(parts))
    total, grads = 0.0, None
    for rows in parts:
        loss, new = step(params, rows)
        total, grads = total + float(loss), new if grads is None else ll.tree_map(torch.add, grads, new)
    return total, grads


def norm(tree: Any) -> float:
    """Give the Euclidean norm of all leaves together."""
    return math.sqrt(sum(float(leaf.detach().float().square().sum()) for leaf in ll.tree_leaves(tree)))


def train(s: Settings, adapt: ll.Adapt, data: Sequence[Example], pad: int, place: Path, every: int = 100) -> tuple[Any, list[float]]:
    """Train, from the state in `place` where there is one; give the params and the loss of each step.

    Raises:
        ValueError: where the state is of a run with other settings.
    """
    params, losses, update = adapt.init(seed=s.seed), [], None
    where = ll.tree_leaves(params)[0].device
    leaves, moments = ll.tree_leaves(params), []
    adam = torch.optim.AdamW(leaves, lr=s.rate, weight_decay=0.1)
    if place.is_file():
        kept = load_state(place)
        require_same(kept["settings"], s, place)
        losses, update, moments = kept["losses"], to_device(kept["update"], where), to_device(kept["adam"], where)
        with torch.no_grad():
            ll.tree_map(lambda p, old: p.copy_(old), params, kept["params"])
        adam.state.update({leaf: moment for leaf, moment in zip(leaves, moments, strict=True)})
    for step in (bar := tqdm(range(len(losses), s.steps), initial=len(losses), total=s.steps, desc=f"train {s.variant}", mininterval=5)):
        torch.manual_seed(s.seed + step)  # dropout, where there is any: the same whether the run was stopped or not
        first = step * s.accumulate * s.rows
        starts = range(first, first + s.accumulate * s.rows, s.rows)
        loss, grads = gradients(adapt, params, [batch(data[k : k + s.rows], pad, where) for k in starts])
        adam.param_groups[0]["lr"] = s.rate * 0.5 * (1 + math.cos(math.pi * step / s.steps))
        for leaf, grad in zip(leaves, ll.tree_leaves(grads), strict=True):
            leaf.grad = grad
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        adam.step()
        updated, update = adapt.configs[0].update(params, grads, update)
        with torch.no_grad():
            ll.tree_map(lambda p, new: p if new is p else p.copy_(new), params, updated)
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if len(losses) % every == 0 or len(losses) == s.steps:
            moments = [adam.state[leaf] for leaf in leaves]
            save_state(place, {"settings": asdict(s), "params": params, "adam": moments, "update": update, "losses": losses})
    return params, losses


def to_device(state: Any, where: torch.device) -> Any:
    """Move the tensors of a state that was read; a step's count stays on the CPU, where AdamW keeps it."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(where) if t.dim() else t, state)


def require_same(kept: Mapping[str, Any], s: Settings, place: Path) -> None:
    """Refuse to go on with a run of other settings."""
    now = json.loads(json.dumps(asdict(s)))
    other = sorted(k for k in now if now[k] != kept.get(k))
    if other:
        found = ", ".join(f"{k}={kept.get(k)!r} instead of {now[k]!r}" for k in other)
        raise ValueError(f'gsm8k: expected the state in "{place}" to be of this run, found {found}. Use another --out, or remove it.')


@torch.no_grad()
def evaluate(s: Settings, model: Any, tokenizer: Any, rows: Any, place: Path) -> dict[str, Any]:
    """Answer the questions greedily and score them; answers are kept as they come, and those that are there are not made again."""
    lines = place.read_text("utf-8").split("\n")[:-1] if place.is_file() else []  # a line cut short by a stop has no end
    done = [json.loads(line) for line in lines]
    place.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    with place.open("a", encoding="utf-8") as file:
        for k in tqdm(range(len(done), len(rows), s.eval_rows), desc=f"evaluate {place.stem}", mininterval=5):
            part = rows.select(range(k, min(k + s.eval_rows, len(rows))))
            prompts = [PROMPT.format(query=q) for q in part["question"]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=s.longest).to(model.device)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            out = model.generate(**inputs, max_new_tokens=s.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            new = [{"prediction": text, "right": right(text, answer)} for text, answer in zip(texts, part["answer"], strict=True)]
            file.write("".join(json.dumps(line) + "\n" for line in new))
            file.flush()
            done += new
    share = sum(line["right"] for line in done) / len(done)
    return {"exact": share, "error": math.sqrt(share * (1 - share) / len(done)), "n": len(done)}


def costs(adapt: ll.Adapt, params: Any, model: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Give the time of a forward pass and of a step on one batch, ours and the frozen model's, in milliseconds, and the step's peak."""

    def step() -> Any:
        return gradients(adapt, params, [rows])

    calls = {"forward": torch.no_grad()(lambda: adapt(params, rows, use_cache=False)), "step": step}
    calls["frozen step"] = lambda: frozen_step(model, rows)
    times = interleaved(calls, 5, where=model.device)
    return {"ms": {name: spread([1e3 * t for t in values]) for name, values in times.items()}, "peak_bytes": peak_bytes(step)}
