"""Trees of one adapt as trees of another of the same method, with room for their ranks: padded, at the scale that they had."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.clone.params import require_fit
from lora_lite.core.config import AdapterConfig, with_fields
from lora_lite.core.errors import listed
from lora_lite.core.frozen import Params
from lora_lite.core.tree import AnyTree, Tree
from lora_lite.prepare.start import start_params
from lora_lite.transforms.padding import Factors, LeafShapes, Side, exact_map, factors, holds, idle, padded_to

Pair = tuple[Adapt, AnyTree]
PLACES = {"target_names": (), "target_roles": (), "exclude_names": (), "layers": None, "dtype": torch.float32}
"""The fields that say where a config is, at values that say nothing."""


class Entry(NamedTuple):
    """A target with its config, the layer with the config's constants, and the shapes of its own params."""

    cfg: AdapterConfig
    W: Any
    shapes: LeafShapes
    shares: bool

    @property
    def on_one_map(self) -> bool:
        """Whether one linear map of vectors shows what the variant does."""
        return self.cfg.adapts == "linear" and "rows" not in self.cfg.uses and not self.shares

    def starts_at_zeros(self) -> bool:
        """Whether the variant starts at the base model, by params of zeros."""
        if self.shares or self.cfg.identity != 0.0:
            return False
        return not any(p.any() for p in start_params(self.cfg, self.W, torch.Generator()).values())

    def sides(self) -> list[Side]:
        """Return the variant on each linear map of the layer."""
        leaves = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        maps = self.W.pairs(leaves)
        return [Side(self.cfg, exact_map(W, self.cfg.uses), {name: tuple(p.shape) for name, p in own.items()}) for W, own in maps]


def entries_of(adapt: Adapt) -> dict[str, Entry]:
    """Return the entry of each target, by its path."""
    plan, shared = adapt._plan, adapt._plan.shared_params()
    return {target.path: Entry(cfg, plan.layer(target, cfg), plan.shapes[target.path], cfg.name in shared) for target, cfg in plan.entries}


def host_of(pairs: Sequence[Pair], adapt: Adapt | None) -> Adapt:
    """Return the adapt that is to run a stack: the one that is given, or the first that has room for all.

    Raises:
        ValueError: where none has.
    """
    adapts = [own for own, _ in pairs]
    hosts = list(dict.fromkeys(adapts)) if adapt is None else [adapt]
    for host in hosts:
        if all(_lack(host, own) is None for own in adapts):
            return host
    k, lack = next((k, lack) for k, own in enumerate(adapts) if (lack := _lack(hosts[0], own)) is not None)
    raise ValueError(
        f"stack: expected an adapt with room for all trees, found that {'none has' if adapt is None else 'the given one lacks'} it: {lack} "
        f"in tree {k}. {_way_out([*adapts, *hosts])}"
    )


def _way_out(adapts: Sequence[Adapt]) -> str:
    """Return the way to one adapt for all. None has room for a layer whose leaves have other names in another tree."""
    names: dict[str, set[str]] = {}
    for path, leaves in (place for adapt in adapts for place in adapt.shapes.items()):
        if names.setdefault(path, set(leaves)) != set(leaves):
            return f'"{path}" has other leaves in each, for which no adapt has room: ll.to_lora(adapt, params, r=8) makes LoRA of each.'
    return "Build one on all targets, at the largest rank, and pass it as adapt=."


def _lack(host: Adapt, own: Adapt) -> str | None:
    """Describe the first leaf for which a host has no room; None where it has room for all."""
    for path, leaves in own.shapes.items():
        there = host.shapes.get(path, {})
        for name, shape in leaves.items():
            if name not in there or not holds({name: there[name]}, {name: shape}):
                room = f"has the shape {there[name]}, and" if name in there else "is not in it, and has the shape"
                return f'"{path}" "{name}" {room} {shape}'
        if extra := there.keys() - leaves.keys():
            return f'"{path}" has {listed(sorted(extra))}, and nothing of that'
    return None


def tree_in(host: Adapt, own: Adapt, tree: AnyTree, k: int, padding: bool | str) -> Tree:
    """Return tree `k`, of `own`, as a tree of `host`.

    Raises:
        ValueError: where it does not fit its own adapt, or would not compute the same in the other.
    """
    require_fit(tree, own.shapes, "stack")
    if own is host:
        return {path: dict(leaves) for path, leaves in tree.items()}
    found, entries = factors_in(host, own, k, padding), entries_of(host)
    return {path: _leaves(entries.get(path), host.shapes[path], tree.get(path), found.get(path, {})) for path in host.shapes}


def _leaves(entry: Entry | None, shapes: LeafShapes, leaves: Params | None, scale: Factors) -> dict[str, Tensor]:
    if leaves is None and entry is not None:
        return {name: torch.zeros(shape, dtype=entry.cfg.dtype, device=entry.W.device) for name, shape in shapes.items()}
    own = leaves or {}
    return {name: padded_to(own[name] * scale[name] if name in scale else own[name], shape) for name, shape in shapes.items()}


def factors_in(host: Adapt, own: Adapt, k: int, padding: bool | str) -> dict[str, Factors]:
    """Return, for each target, the factors of its leaves by which a tree of `own`, padded, computes the same in `host`.

    Args:
        host, own: the adapts.
        k: the tree's place, for an error.
        padding: as `stack` takes it.

    Raises:
        ValueError: where there are none, or shapes differ and are not to be padded.
    """
    known: dict[Any, Factors | None] = {}
    theirs, found = entries_of(own), dict[str, Factors]()
    for path, entry in entries_of(host).items():
        other = theirs.get(path)
        differ = other is None or other.shapes != entry.shapes
        shift = None if differ and padding is False else _shift(entry, other, path, known, trained=padding is True or not differ)
        if shift is None:
            raise ValueError(_refused(path, entry, other, k, padding))
        found[path] = shift
    return found


def _refused(path: str, entry: Entry, other: Entry | None, k: int, padding: bool | str) -> str:
    its = {} if other is None else other.shapes
    name = next((n for n in entry.shapes if its.get(n) != entry.shapes[n]), next(iter(entry.shapes), "shared params"))
    found = f"found {its[name]} in tree {k} beside {entry.shapes[name]}" if name in its else f"found none in tree {k}"
    if other is not None and its == entry.shapes:
        return (
            f'stack: at "{path}" expected a config that computes the same as that of the adapt which runs the stack, found '
            f"{_differing(other.cfg, entry.cfg)} in tree {k}. Build the adapts with one config, or run that tree by itself."
        )
    if padding is False:
        return f'stack: at "{path}" "{name}" expected leaves of one shape, {found}. Pass pad=True.'
    kinds = dict.fromkeys(type(e.cfg).__name__ for e in (other, entry) if e is not None)
    return (
        f'stack: at "{path}" "{name}" expected a leaf whose padding by zeros changes nothing, {found}: under {" and ".join(kinds)} '
        "the member would compute something else, or its padding would be trained. Build the adapts with one config, pass "
        'pad="frozen" for a stack that is not trained, or run that tree by itself.'
    )


def _differing(own: AdapterConfig, host: AdapterConfig) -> str:
    """Describe in what a config departs from another."""
    if type(own) is not type(host):
        return f"{type(own).__name__} beside {type(host).__name__}"
    pairs = ((f.name, getattr(own, f.name), getattr(host, f.name)) for f in fields(own))
    differ = [f"{name}={mine!r} beside {theirs!r}" for name, mine, theirs in pairs if name not in PLACES and mine != theirs]
    return f"{type(own).__name__} of {listed(differ) or 'other constants'}"


def _shift(entry: Entry, other: Entry | None, path: str, known: dict[Any, Factors | None], trained: bool) -> Factors | None:
    """Return the factors at one target. Targets of equal configs, shapes and constants share them: they are compared once."""
    alike = other is None or _equal(entry.W.constants, other.W.constants)
    if other is not None and alike and entry.shapes == other.shapes and _plain(entry.cfg) == _plain(other.cfg):
        return {}
    if any(e is not None and not e.on_one_map for e in (entry, other)):
        return {} if other is None and not trained and entry.starts_at_zeros() else None
    if other is not None and other.cfg.acts_at != entry.cfg.acts_at:
        return None  # at positions of the host's
    key = tuple(repr(_plain(e.cfg)) + str(e.shapes) for e in (entry, other) if e is not None), None if alike else path
    if key not in known:
        known[key] = _compared(entry, other, alike, trained)
    shift = known[key]
    return None if shift is None else {name: shift[_bare(name)] for name in entry.shapes if _bare(name) in shift}


def _compared(entry: Entry, other: Entry | None, alike: bool, trained: bool) -> Factors | None:
    """Compare the maps of a layer one by one; those of the same shapes once, where their constants do not matter."""
    if other is None:
        return {} if all(idle(side, trained) for side in entry.sides()) else None
    pairs = list(zip(other.sides(), entry.sides()))
    if alike and not entry.W.constants:
        pairs = list({(str(own.shapes), str(host.shapes)): (own, host) for own, host in pairs}.values())
    found = [factors(own, host, trained) for own, host in pairs]
    return found[0] if all(each == found[0] for each in found) else None


def _plain(cfg: AdapterConfig) -> AdapterConfig:
    """Return a config without the fields that say where it is."""
    return with_fields(cfg, **PLACES)


def _bare(name: str) -> str:
    return name.rpartition(".")[2]  # a fused layer has the leaves of each map under the map's name


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a)
