"""AdaLoRA's budget: sensitivities smoothed over steps, triplets scored by them, the lowest masked by a cubic schedule.

Pure functions from one state to the next, eq. (5)-(11) of the paper as PEFT computes them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.errors import require_grads, require_one_map, require_targets
from lora_lite.core.tree import AnyTree, apart, named, together, tree_map

Leaves = Mapping[str, Tensor]


def allocate(cfg: Any, params: AnyTree, grads: AnyTree, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return params with pruned `E`, and the next state: step, smoothed sensitivity and uncertainty, mask."""
    require_grads("AdaLoRAConfig.update(params, grads, state)", params, grads)
    places = apart(params)  # a fused layer has several maps
    maps, slopes = by_map(params), by_map(grads)
    ours = [where for where, leaves in maps.items() if set(leaves) == {"A", "B", "E"}]
    require_targets("AdaLoRAConfig.update", ours, "AdaLoRA")
    require_one_map(
        "AdaLoRAConfig.update", maps, ours, {"A": 2, "B": 2, "E": 1}, "Experts of one parameter have no budget: leave them out."
    )
    zeros = tree_map(torch.zeros_like, {where: maps[where] for where in ours})
    state = state or {"step": 0, "sensitivity": zeros, "uncertainty": zeros, "mask": None}
    step = state["step"] + 1
    sensitivity, uncertainty, mask = state["sensitivity"], state["uncertainty"], state["mask"]
    if step < cfg.total_step - cfg.tfinal:
        sensitivity, uncertainty = _smoothed(cfg, maps, slopes, sensitivity, uncertainty, ours)
        budget = _budget(cfg, step, len(ours))
        mask = _mask(maps, sensitivity, uncertainty, ours, budget) if budget is not None else None
    elif step == cfg.total_step - cfg.tfinal:  # one last allocation, which stays
        mask = _mask(maps, sensitivity, uncertainty, ours, cfg.target_r * len(ours))
    kept = mask or {}
    pruned = {place: {**own, "E": own["E"] * kept[named(place)]} if named(place) in kept else own for place, own in places.items()}
    return together(pruned), {"step": step, "sensitivity": sensitivity, "uncertainty": uncertainty, "mask": mask}


def by_map(tree: AnyTree) -> dict[str, dict[str, Any]]:
    """Return the leaves of each linear map under one name: the target's path, in a fused layer with the map's name."""
    return {named(place): leaves for place, leaves in apart(tree).items()}


def _smoothed(cfg: Any, params: AnyTree, grads: AnyTree, sensitivity: Any, uncertainty: Any, ours: list[str]) -> tuple[Any, Any]:
    new: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path in ours:
        new[0][path], new[1][path] = {}, {}
        for name, p in params[path].items():
            s = (p.detach() * grads[path][name].detach()).abs()  # eq. (8), with the params after the step; a graph would grow for ever
            smooth = cfg.beta1 * sensitivity[path][name] + (1 - cfg.beta1) * s  # eq. (9)
            new[0][path][name] = smooth
            new[1][path][name] = cfg.beta2 * uncertainty[path][name] + (1 - cfg.beta2) * (s - smooth).abs()  # eq. (10)
    return new


def _budget(cfg: Any, step: int, maps: int) -> int | None:
    """Return the number of triplets that stay, or None where this step prunes nothing."""
    start, end = cfg.init_r * maps, cfg.target_r * maps
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
