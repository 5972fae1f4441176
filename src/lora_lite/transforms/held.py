"""The form in which a combined update is held: in its own variant where that is linear in the params, else as LoRA."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.config import AdapterConfig, with_fields
from lora_lite.core.frozen import Constants
from lora_lite.core.plan import Plan, Target
from lora_lite.core.tree import Tree
from lora_lite.prepare.checks import check_uses
from lora_lite.transforms.merging import total
from lora_lite.transforms.places import Part, Place
from lora_lite.transforms.product import Product, dense
from lora_lite.transforms.updates import Update, best_of_rank, decomposed, on_one_basis, side_by_side, update_of, widened
from lora_lite.variants.bitfit import BitFitConfig
from lora_lite.variants.full import FullConfig
from lora_lite.variants.ln_tuning import LNTuningConfig
from lora_lite.variants.lora import LoRAConfig


@dataclass(frozen=True)
class Kept:
    """A target of the result: its config but for the names, its params and its constants, and the update that they make."""

    target: Target
    cfg: AdapterConfig
    leaves: Mapping[str, Tensor]
    constants: Constants
    update: Update


@dataclass(frozen=True)
class Factored:
    """A target whose update is held by factors, the rank of which is settled when those of all targets are known.

    Attributes:
        target: the layer's place in the model.
        W: the layer.
        pairs: `A (k, i)` and `B (o, k)` of each linear map.
        biases: the change of each map's bias `(o,)`; empty where none is moved.
        group: equal for targets of the same configs, which get one rank.
        bound: the rank that is never needed more of.
        dtype: of the params.
    """

    target: Target
    W: Any
    pairs: Sequence[tuple[Tensor, Tensor]]
    biases: Sequence[Tensor]
    group: tuple[Any, ...]
    bound: int
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """The largest rank of the maps."""
        return max(len(A) for A, _ in self.pairs)

    @property
    @torch.no_grad()
    def update(self) -> Update:
        """The update that the factors make once they are rounded."""
        weights = [Product(B.to(self.dtype).double(), A.to(self.dtype).double()) for A, B in self.pairs]
        biases = [b.to(self.dtype) for b in self.biases] or [B.new_zeros(len(B)) for _, B in self.pairs]
        found: Update = {f"weight.{n}": product for n, product in enumerate(weights)}
        return found | {f"bias.{n}": b for n, b in enumerate(biases)}

    def settled(self, r: int, needed: int) -> Kept:
        """Return the target at rank `r`: LoRA of scale 1, and BitFit where biases alone are moved, so that no rank is needed."""
        if self.biases and not needed:
            cfg: AdapterConfig = BitFitConfig(dtype=self.dtype)
            trees = [{"db": b} for b in self.biases]
        else:
            r = max(r, 1)
            cfg = LoRAConfig(r=r, alpha=float(r), lora_bias=bool(self.biases), dtype=self.dtype)
            trees = [dict(widened(A, B, r)) for A, B in self.pairs]
            for tree, b in zip(trees, self.biases):
                tree["b"] = b
        check_uses(self.target, cfg)
        given = iter(trees)
        leaves = self.W.make(lambda _: {name: t.to(self.dtype) for name, t in next(given).items()})
        return Kept(self.target, cfg, leaves, {}, {})


Held = Kept | Factored


def hold(
    parts: Sequence[Part],
    place: Place,
    updates: Sequence[Update],
    wanted: Update,
    weights: Sequence[Tensor],
    keep: str | None,
    r: int | None,
) -> Held:
    """Hold a target's combined update.

    Args:
        parts: the adapters.
        place: the target.
        updates: that of each adapter that reaches the target.
        wanted: the combined one.
        weights: those of these adapters.
        keep: the form of a sum without loss, as in `Method`; None for an approximation.
        r: the rank asked for, if any.
    """
    dtype = torch.float32
    for _, cfg in place.owners:
        dtype = torch.promote_types(dtype, cfg.dtype)
    if place.rows:
        return _as_rows(place, wanted, dtype)
    first = parts[place.owners[0][0]]
    if place.whole:
        return _as_displacements(first, place, wanted, dtype)
    factored = any(isinstance(t, Product) for update in updates for t in update.values())
    if keep is not None and not factored and _is_additive(parts, place):
        return _as_it_is(parts, place, weights, dtype)
    return _as_factors(first, place, updates, wanted, weights, keep, r, dtype)


def _as_rows(place: Place, wanted: Update, dtype: torch.dtype) -> Kept:
    tokens = tuple(int(token) for token in wanted)
    dE = torch.stack([dense(row) for row in wanted.values()]).to(dtype)
    constants = {"ids": torch.tensor(tokens, device=dE.device)}
    return Kept(place.target, with_fields(place.cfg, token_ids=tokens, dtype=dtype), {"dE": dE}, constants, _as(dtype, wanted))


def _as_displacements(part: Part, place: Place, wanted: Update, dtype: torch.dtype) -> Kept:
    whole = FullConfig if place.cfg.adapts == "module" else LNTuningConfig
    own = part.layer(place.path).parameters
    leaves = {name: dense(wanted[name]).to(dtype) if name in wanted else torch.zeros_like(p, dtype=dtype) for name, p in own.items()}
    return Kept(place.target, whole(dtype=dtype), leaves, {}, _as(dtype, wanted))


def _as(dtype: torch.dtype, update: Update) -> Update:
    return {name: dense(t).to(dtype) for name, t in update.items()}


def _is_additive(parts: Sequence[Part], place: Place) -> bool:
    """Whether adapters of one config make an update that is linear in their params, so that a sum of these is theirs."""
    own = parts[place.owners[0][0]].constants(place.path)
    for k, cfg in place.owners:
        constants = parts[k].constants(place.path)
        same = constants.keys() == own.keys() and all(c is own[name] or torch.equal(c, own[name]) for name, c in constants.items())
        if parts[k].shares(cfg) or not same or _named(cfg, ()) != _named(place.cfg, ()):
            return False
    return parts[place.owners[0][0]].additive(place.cfg)


def _as_it_is(parts: Sequence[Part], place: Place, weights: Sequence[Tensor], dtype: torch.dtype) -> Kept:
    part = parts[place.owners[0][0]]
    trees = [parts[k].leaves(place.path) for k, _ in place.owners]
    leaves = {name: total([tree[name].detach().double() for tree in trees], weights).to(dtype) for name in trees[0]}
    update = update_of(part.layer(place.path), place.cfg, {name: leaf.detach() for name, leaf in leaves.items()})
    return Kept(place.target, with_fields(place.cfg, dtype=dtype), leaves, part.constants(place.path), dict(update))


def _as_factors(
    part: Part,
    place: Place,
    updates: Sequence[Update],
    wanted: Update,
    weights: Sequence[Tensor],
    keep: str | None,
    r: int | None,
    dtype: torch.dtype,
) -> Factored:
    W = part.layer(place.path)
    maps = len(wanted) // 2
    pairs, bounds = [], []
    for name in (f"weight.{n}" for n in range(maps)):
        deltas = [update[name] for update in updates]
        bounds.append(min(deltas[0].shape) * (len(deltas) if keep == "factors" else 1))
        if keep is None:
            pairs.append(best_of_rank(wanted[name], r or max(len(decomposed(delta)[1]) for delta in deltas)))
        else:
            pairs.append((side_by_side if keep == "factors" else on_one_basis)(deltas, weights))
    biases = [dense(wanted[f"bias.{n}"]) for n in range(maps)]
    size = 1.0 if W.bias is None else max(1.0, float(W.bias.detach().abs().max()))
    moved = any(float(b.detach().abs().max()) > 1e-12 * size for b in biases)
    group = tuple((k, id(cfg)) for k, cfg in place.owners)
    return Factored(place.target, W, pairs, biases if moved else [], group, max(bounds), dtype)


def assembled(parts: Sequence[Part], found: Sequence[Held], r: int | None) -> tuple[Adapt, Tree]:
    """Make one adapter of the targets, over the base of the first. Targets of equal configs share one, which names them all."""
    ranks: dict[tuple[Any, ...], int] = {}
    for held in found:
        if isinstance(held, Factored):
            ranks[held.group] = max(held.rank, ranks.get(held.group, 0))
    settled = [
        held if isinstance(held, Kept) else held.settled(r or min(ranks[held.group], held.bound), ranks[held.group]) for held in found
    ]
    configs: list[tuple[AdapterConfig, list[str]]] = []
    for kept in settled:
        anonymous = _named(kept.cfg, ())
        known = next((paths for cfg, paths in configs if cfg == anonymous), None)
        if known is None:
            configs.append((anonymous, [kept.target.path]))
        else:
            known.append(kept.target.path)
    by_path = {path: named for cfg, paths in configs for named in [_named(cfg, paths)] for path in paths}
    tree = {kept.target.path: dict(kept.leaves) for kept in settled}
    plans = [part.adapt._plan for part in parts]
    plan = Plan(
        base=plans[0].base,
        entries=tuple((kept.target, by_path[kept.target.path]) for kept in settled),
        shapes={path: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for path, leaves in tree.items()},
        constants={kept.target.path: kept.constants for kept in settled},
        remat=plans[0].remat,
        kinds=tuple(dict.fromkeys(kind for plan in plans for kind in plan.kinds)),
        task_type=next((plan.task_type for plan in plans if plan.task_type), None),
    )
    return Adapt(plan), tree


def _named(cfg: AdapterConfig, paths: Sequence[str]) -> AdapterConfig:
    """Return a config that takes these layers and no others."""
    names = tuple(f"^{re.escape(path)}$" for path in paths)
    return with_fields(cfg, target_names=names, exclude_names=(), target_roles=(), layers=None)
