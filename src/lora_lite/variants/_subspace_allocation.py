"""AdaMSS's allocation: subspaces scored by smoothed sensitivities, and the lowest of the whole model frozen as they are.

A pure function from one state to the next, as PEFT computes it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from lora_lite.core.errors import require_grads, require_one_map, require_targets
from lora_lite.core.tree import AnyTree, apart, named, together, tree_map

Place = tuple[str, str]
"""A target's path, and the name of a map in it."""


class Allocation(TypedDict):
    """The state of an allocation, a tree of tensors that `torch.save` and `torch.load` take as it is.

    Attributes:
        constants: `adapt.constants`.
        step: number of the next step, from 0.
        sensitivity, uncertainty: smoothed, trees like the params.
        active: which subspaces of each map are trained, `(k,)`.
        kept: the params of these maps at which the others stay.
    """

    constants: AnyTree
    step: int
    sensitivity: AnyTree
    uncertainty: AnyTree
    active: Mapping[str, Tensor]
    kept: AnyTree


def started(state: Any) -> Allocation:
    """Return the state as it is, or that before the first step where it is `adapt.constants`."""
    if set(state) == Allocation.__required_keys__:
        return cast(Allocation, state)
    return {"constants": state, "step": 0, "sensitivity": {}, "uncertainty": {}, "active": {}, "kept": {}}


def allocate(cfg: Any, params: AnyTree, grads: AnyTree, state: Allocation) -> tuple[dict[str, Any], Allocation]:
    """Return the params with frozen subspaces restored, and the next state."""
    require_grads("AdaMSSConfig.update(params, grads, state)", params, grads)
    sizes = {place: own["shapes"] for place, own in apart(state["constants"]).items() if "cells" in own}
    places = apart(params)
    own = {place: leaves for place, leaves in places.items() if set(leaves) == {"A", "B"} and place in sizes}
    require_targets("AdaMSSConfig.update", own, "AdaMSS")
    shapes = {where: sizes[place] if n is None else sizes[place][n] for place in own for where, n in _names(place, sizes)}
    maps, slopes = _each(own, places, sizes), _each(own, apart(grads), sizes)
    require_one_map("AdaMSSConfig.update", maps, maps, {"A": 2, "B": 1})
    zeros = tree_map(torch.zeros_like, maps)
    if not state["active"]:
        active = {where: torch.ones_like(shape[:, 0], dtype=torch.bool) for where, shape in shapes.items()}
        state = {**state, "sensitivity": zeros, "uncertainty": zeros, "active": active, "kept": maps}
    owners = {where: owners_of(shape) for where, shape in shapes.items()}
    trained = {where: {name: state["active"][where][owner] for name, owner in owners[where].items()} for where in maps}
    restored = {
        where: {
            name: torch.where(_like(mask, maps[where][name]), maps[where][name], state["kept"][where][name]) for name, mask in masks.items()
        }
        for where, masks in trained.items()
    }
    step = state["step"]
    if cfg.init_warmup <= step <= cfg.final_warmup:
        state = _smoothed(cfg, restored, slopes, trained, state)
        if step % cfg.mask_interval == 0:
            active = _active(cfg, state, owners)
            kept = tree_map(torch.Tensor.detach, restored)  # a graph would grow for ever
            state = {**state, "active": active, "kept": kept, "sensitivity": zeros, "uncertainty": zeros}
    return together({**places, **_joined(own, restored, sizes)}), {**state, "step": step + 1}


def _each(own: Iterable[Place], places: Mapping[Place, Mapping[str, Any]], sizes: Mapping[Place, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the leaves of each linear map under a name of its own. A fused layer has several maps, and so has a stack."""
    found: dict[str, dict[str, Any]] = {}
    for place in own:
        for where, n in _names(place, sizes):
            found[where] = {name: leaf if n is None else leaf[n] for name, leaf in places[place].items()}
    return found


def _joined(own: Iterable[Place], maps: AnyTree, sizes: Mapping[Place, Tensor]) -> dict[Place, dict[str, Any]]:
    """Return the leaves of each place from those of its maps: the inverse of `_each`."""
    found: dict[Place, dict[str, Any]] = {}
    for place in own:
        each = [maps[where] for where, _ in _names(place, sizes)]
        found[place] = {name: torch.stack([t[name] for t in each]) for name in each[0]} if sizes[place].dim() > 2 else dict(each[0])
    return found


def _names(place: Place, sizes: Mapping[Place, Tensor]) -> list[tuple[str, int | None]]:
    """Return the name of each map of a place, and its number in a stack."""
    where = named(place)
    return [(f"{where}[{n}]", n) for n in range(len(sizes[place]))] if sizes[place].dim() > 2 else [(where, None)]


def owners_of(shapes: Tensor) -> dict[str, Tensor]:
    """Return the subspace of each row of `A` and of each entry of `B`."""
    sizes, ranks = shapes.unbind(1)
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
            old, p = state["sensitivity"][path][name], params[path][name]
            now = (p.detach() * grads[path][name].detach()).abs() * _like(mask, p)
            new[0][path][name] = b1 * old + (1 - b1) * now
            new[1][path][name] = b2 * state["uncertainty"][path][name] + (1 - b2) * (now - old).abs()  # with the sensitivity before
    return {**state, "sensitivity": new[0], "uncertainty": new[1]}


def _active(cfg: Any, state: Allocation, owners: AnyTree) -> dict[str, Tensor]:
    """Mark the subspaces that stay, by the budget of the schedule, among those that are trained still."""
    left = 1 - (state["step"] - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
    total = sum(len(active) for active in state["active"].values())
    budget = int(cfg.asa_target_subspaces + (total - cfg.asa_target_subspaces) * left**cfg.asa_schedule_exponent)
    scores = {path: _scores(state, path, owners[path]) for path in owners}
    candidates = torch.cat([score[state["active"][path]] for path, score in scores.items()])
    if budget >= len(candidates):
        return dict(state["active"])
    threshold = candidates.topk(budget).values[-1]
    return {path: state["active"][path] & (score > threshold) for path, score in scores.items()}  # as in PEFT, the last itself goes


def _scores(state: Allocation, path: str, owners: Mapping[str, Tensor]) -> Tensor:
    score = torch.zeros(len(state["active"][path]), device=state["active"][path].device)
    for name, owner in owners.items():
        each = state["sensitivity"][path][name] * state["uncertainty"][path][name]
        each = each.mean(1) if each.dim() > 1 else each
        score = score + torch.zeros_like(score).index_add(0, owner, each.to(score)) / owner.bincount(minlength=len(score))
    return score
