"""The training loops of `quality.py`: ours as a population, PEFT's and full fine-tuning one seed at a time, all with one optimiser.

AdamW without decay, a one-cycle schedule, gradients of each seed clipped to norm 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import lora_lite as ll
from arithmetic import IGNORE, PAD, Row, batch
from pairs import wrapped

Reached = tuple[float, float, int]  # exact share, loss a character, test problems


def optimiser(leaves: Sequence[Tensor], rate: float, steps: int) -> tuple[Any, Any]:
    """Give AdamW and its schedule."""
    found = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
    return found, torch.optim.lr_scheduler.OneCycleLR(found, rate, total_steps=max(steps, 2), pct_start=0.1)


def losses(output: Any, labels: Tensor) -> Tensor:
    """Give the loss of each character, `(rows, length - 1)`, zero where there is no label."""
    logits, wanted = output.logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="none").view(wanted.shape)


@torch.no_grad()
def evaluate(forward: Callable[[Any], Any], test: Sequence[Row], size: int = 50) -> Reached:
    """Give the share of answers that greedy generation would write exactly, and the mean loss of their characters."""
    right, total, count = 0, 0.0, 0
    for start in range(0, len(test), size):
        rows = batch(test[start : start + size])
        output, labelled = forward({"input_ids": rows["input_ids"], "use_cache": False}), rows["labels"][:, 1:] != IGNORE
        chosen = output.logits[:, :-1].argmax(-1)
        right += int(((chosen == rows["labels"][:, 1:]) | ~labelled).all(1).sum())
        total, count = total + float(losses(output, rows["labels"]).sum()), count + int(labelled.sum())
    return right / len(test), total / count, len(test)


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Lay the members' batches under each other, padded to one length."""
    width = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": PAD, "labels": IGNORE}
    return {k: torch.cat([pad(part[k], (0, width - part[k].shape[1]), value=v) for part in parts]) for k, v in fill.items()}


def train_ours(adapt: ll.Adapt, data: Sequence[Iterator[Any]], test: Sequence[Row], steps: int, rates: Sequence[float]) -> list[Reached]:
    """Train a member on each stream of batches at its own rate, all in one mixed batch a step, and evaluate each."""
    params, members = ll.stack([adapt.init(seed=k) for k in range(len(data))]), len(data)
    leaves = ll.tree_leaves(params)
    adam, schedule = optimiser(leaves, 1.0, steps)  # each member goes its rate's part of the way, which without decay is the rate's step
    state: list[Any] = [None] * members

    def total(params: Any, rows: Mapping[str, Tensor]) -> Tensor:
        found = losses(adapt.mixed(params, {"input_ids": rows["input_ids"]}, use_cache=False), rows["labels"])
        labelled = (rows["labels"][:, 1:] != IGNORE).unflatten(0, (members, -1)).flatten(1)
        return (found.unflatten(0, (members, -1)).flatten(1).sum(1) / labelled.sum(1)).sum()

    step = ll.value_and_grad(total)
    for parts in zip(*data, strict=True):
        grads = step(params, joined(parts))[1]
        by_leaf = ll.tree_leaves(grads)
        norm = torch.stack([g.reshape(members, -1).square().sum(1) for g in by_leaf]).sum(0).sqrt()  # (members,)
        for leaf, grad in zip(leaves, by_leaf, strict=True):
            leaf.grad = grad / _along(norm.clamp(min=1.0), grad)
        before = [leaf.clone() for leaf in leaves]
        adam.step()
        schedule.step()
        for leaf, old in zip(leaves, before, strict=True):
            leaf.copy_(torch.lerp(old, leaf, _along(torch.tensor(rates), leaf)))
        state = updated(adapt.configs[0], params, grads, state)
    return [evaluate(lambda rows, p=member: adapt(p, rows), test) for member in ll.unstack(params)]


def _along(values: Tensor, leaf: Tensor) -> Tensor:
    """Lay a number of each member along a stacked leaf's other axes."""
    return values.view(-1, *[1] * (leaf.dim() - 1))


@torch.no_grad()
def updated(cfg: ll.AdapterConfig, params: Any, grads: Any, state: list[Any]) -> list[Any]:
    """Do what the method does after a step (AdaLoRA prunes, AntiPaSTO projects) to each member, in place, and give the next state."""
    if type(cfg).update is ll.AdapterConfig.update:
        return state
    done = [cfg.update(p, g, s) for p, g, s in zip(ll.unstack(params), ll.unstack(grads), state, strict=True)]
    ll.tree_map(lambda leaf, new: leaf.copy_(new), params, ll.stack([p for p, _ in done]))
    return [s for _, s in done]


def _train(
    model: nn.Module, leaves: Sequence[Tensor], data: Iterator[Any], steps: int, rate: float, after: Callable[[int], None] = lambda _: None
) -> None:
    adam, schedule = optimiser(leaves, rate, steps)
    for number, rows in enumerate(data):
        loss = model(**rows, use_cache=False).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        adam.step()
        schedule.step()
        after(number)


def train_peft(
    model: nn.Module, config: Any, calibration: Sequence[Any], data: Iterator[Any], test: Sequence[Row], steps: int, rate: float, seed: int
) -> Reached:
    """Let PEFT adapt the model in place and train it as ours are trained."""
    torch.manual_seed(seed)
    adapted, leaves = wrapped(model, config, calibration)
    update = getattr(adapted.base_model, "update_and_allocate", lambda _: None)  # AdaLoRA's pruning, called by the user's loop
    inner = adapted.get_base_model()  # without AdaLoRA's penalty, which the loop of ours leaves out too
    _train(inner, leaves, data, steps, rate, update)
    return evaluate(lambda rows: inner(**rows), test)


def train_full(model: nn.Module, data: Iterator[Any], test: Sequence[Row], steps: int, rate: float) -> Reached:
    """Train every parameter of the model, in place."""
    _train(model, list(model.requires_grad_().parameters()), data, steps, rate)
    return evaluate(lambda rows: model(**rows), test)
