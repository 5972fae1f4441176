"""AdaLoRA's budget: sensitivities smoothed over steps, triplets scored by them, the lowest masked by a cubic schedule.

Pure functions from one state to the next, eq. (5)-(11) of the paper as PEFT computes them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.errors import require_grads, require_targets
from lora_lite.core.tree import AnyTree, tree_map

Leaves = Mapping[str, Tensor]


def allocate(cfg: Any, params: AnyTree, grads: AnyTree, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return params with pruned `E`, and the next state: step, smoothed sensitivity and uncertainty, mask."""
    require_grads("AdaLoRAConfig.update(params, grads, state)", params, grads)
    ours = [path for path, leaves in params.items() if set(leaves) == {"A", "B", "E"}]
    require_targets("AdaLoRAConfig.update", ours, "AdaLoRA")
    zeros = tree_map(torch.zeros_like, {path: params[path] for path in ours})
    state = state or {"step": 0, "sensitivity": zeros, "uncertainty": zeros, "mask": None}
    step = state["step"] + 1
    sensitivity, uncertainty, mask = state["sensitivity"], state["uncertainty"], state["mask"]
    if step < cfg.total_step - cfg.tfinal:
        sensitivity, uncertainty = _smoothed(cfg, params, grads, sensitivity, uncertainty, ours)
        budget = _budget(cfg, step, len(ours))
        mask = _mask(params, sensitivity, uncertainty, ours, budget) if budget is not None else None
    elif step == cfg.total_step - cfg.tfinal:  # one last allocation, which stays
        mask = _mask(params, sensitivity, uncertainty, ours, cfg.target_r * len(ours))
    pruned = {path: {**leaves, "E": leaves["E"] * mask[path]} if mask and path in mask else dict(leaves) for path, leaves in params.items()}
    return pruned, {"step": step, "sensitivity": sensitivity, "uncertainty": uncertainty, "mask": mask}


def _smoothed(cfg: Any, params: AnyTree, grads: AnyTree, sensitivity: Any, uncertainty: Any, ours: list[str]) -> tuple[Any, Any]:
    new: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path in ours:
        new[0][path], new[1][path] = {}, {}
        for name, p in params[path].items():
            s = (p * grads[path][name]).abs()  # eq. (8), with the params after the step
            smooth = cfg.beta1 * sensitivity[path][name] + (1 - cfg.beta1) * s  # eq. (9)
            new[0][path][name] = smooth
            new[1][path][name] = cfg.beta2 * uncertainty[path][name] + (1 - cfg.beta2) * (s - smooth).abs()  # eq. (10)
    return new


def _budget(cfg: Any, step: int, targets: int) -> int | None:
    """Return the number of triplets that stay, or None where this step prunes nothing."""
    start, end = cfg.init_r * targets, cfg.target_r * targets
    if step <= cfg.tinit or step % cfg.deltaT:
        return None
    left = 1 - (step - cfg.tinit) / (cfg.total_step - cfg.tfinal - cfg.tinit)
    return int((start - end) * left**3 + end)


def _mask(params: AnyTree, sensitivity: AnyTree, uncertainty: AnyTree, ours: list[str], budget: int) -> dict[str, Tensor] | None:
    """Mark the triplets that stay, 1 or 0, over the whole model."""
    scores = {path: _scores(sensitivity[path], uncertainty[path]) for path in ours}
    every = torch.cat(list(scores.values()))
    pruned = len(every) - budget
    if pruned <= 0:
        return None
    threshold = every.kthvalue(pruned).values
    return {path: (score > threshold).to(params[path]["E"].dtype) for path, score in scores.items()}


def _scores(sensitivity: Leaves, uncertainty: Leaves) -> Tensor:
    """Score each triplet, eq. (7) and (11): its singular value's importance and the means of its vectors'."""
    importance = {name: sensitivity[name] * uncertainty[name] for name in sensitivity}
    return importance["E"] + importance["A"].mean(1) + importance["B"].mean(0)
