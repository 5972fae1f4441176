"""AdaMSS's allocation: subspaces scored by smoothed sensitivities, and the lowest of the whole model frozen as they are.

A pure function from one state to the next, as PEFT computes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.errors import require_grads, require_targets
from lora_lite.core.tree import AnyTree, tree_map


@dataclass(frozen=True)
class Allocation:
    """The state of an allocation.

    Attributes:
        constants: `adapt.constants`.
        step: number of the next step, from 0.
        sensitivity, uncertainty: smoothed, trees like the params.
        active: which subspaces of each target are trained, `(k,)`.
        kept: the params at which the others stay.
    """

    constants: AnyTree
    step: int = 0
    sensitivity: AnyTree = field(default_factory=dict)
    uncertainty: AnyTree = field(default_factory=dict)
    active: Mapping[str, Tensor] = field(default_factory=dict)
    kept: AnyTree = field(default_factory=dict)


def allocate(cfg: Any, params: AnyTree, grads: AnyTree, state: Allocation) -> tuple[dict[str, Any], Allocation]:
    """Return the params with frozen subspaces restored, and the next state."""
    require_grads("AdaMSSConfig.update(params, grads, state)", params, grads)
    ours = [path for path, leaves in params.items() if set(leaves) == {"A", "B"} and "cells" in state.constants.get(path, {})]
    require_targets("AdaMSSConfig.update", ours, "AdaMSS")
    if not state.active:
        zeros = tree_map(torch.zeros_like, {path: params[path] for path in ours})
        active = {path: torch.ones_like(state.constants[path]["shapes"][:, 0], dtype=torch.bool) for path in ours}
        state = replace(state, sensitivity=zeros, uncertainty=zeros, active=active, kept=params)
    owners = {path: owners_of(state.constants[path]) for path in ours}
    trained = {path: {name: state.active[path][owner] for name, owner in owners[path].items()} for path in ours}
    restored = {path: dict(leaves) for path, leaves in params.items()}
    for path, masks in trained.items():
        for name, mask in masks.items():
            now = params[path][name]
            restored[path][name] = torch.where(_like(mask, now), now, state.kept[path][name])
    step = state.step
    if cfg.init_warmup <= step <= cfg.final_warmup:
        state = _smoothed(cfg, restored, grads, trained, state)
        if step % cfg.mask_interval == 0:
            zeros = tree_map(torch.zeros_like, {path: params[path] for path in ours})
            active = _active(cfg, state, owners)
            state = replace(state, active=active, kept=restored, sensitivity=zeros, uncertainty=zeros)
    return restored, replace(state, step=step + 1)


def owners_of(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the subspace of each row of `A` and of each entry of `B`."""
    sizes, ranks = constants["shapes"].unbind(1)
    every = torch.arange(len(ranks), device=ranks.device)
    return {"A": every.repeat_interleave(ranks), "B": every.repeat_interleave(sizes * ranks)}


def _like(mask: Tensor, p: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (p.dim() - 1))


def _smoothed(cfg: Any, params: AnyTree, grads: AnyTree, trained: AnyTree, state: Allocation) -> Allocation:
    b1, b2 = cfg.asa_importance_beta, cfg.asa_uncertainty_beta
    new: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, masks in trained.items():
        new[0][path], new[1][path] = {}, {}
        for name, mask in masks.items():
            old, p = state.sensitivity[path][name], params[path][name]
            now = (p * grads[path][name]).abs() * _like(mask, p)
            new[0][path][name] = b1 * old + (1 - b1) * now
            new[1][path][name] = b2 * state.uncertainty[path][name] + (1 - b2) * (now - old).abs()  # with the sensitivity before
    return replace(state, sensitivity=new[0], uncertainty=new[1])


def _active(cfg: Any, state: Allocation, owners: AnyTree) -> dict[str, Tensor]:
    """Mark the subspaces that stay, by the budget of the schedule, among those that are trained still."""
    left = 1 - (state.step - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
    total = sum(len(active) for active in state.active.values())
    budget = int(cfg.asa_target_subspaces + (total - cfg.asa_target_subspaces) * left**cfg.asa_schedule_exponent)
    scores = {path: _scores(state, path, owners[path]) for path in owners}
    candidates = torch.cat([score[state.active[path]] for path, score in scores.items()])
    if budget >= len(candidates):
        return dict(state.active)
    threshold = candidates.topk(budget).values[-1]
    return {path: state.active[path] & (score > threshold) for path, score in scores.items()}  # as in PEFT, the last itself goes


def _scores(state: Allocation, path: str, owners: Mapping[str, Tensor]) -> Tensor:
    score = torch.zeros(len(state.active[path]), device=state.active[path].device)
    for name, owner in owners.items():
        each = state.sensitivity[path][name] * state.uncertainty[path][name]
        each = each.mean(1) if each.dim() > 1 else each
        score = score + torch.zeros_like(score).index_add(0, owner, each.to(score)) / owner.bincount(minlength=len(score))
    return score
