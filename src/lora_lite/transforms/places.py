"""The adapters that `combine` takes, and the places that they adapt: each layer with those that reach it, checked before any arithmetic."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, several
from lora_lite.core.frozen import Constants, Params
from lora_lite.core.plan import Target
from lora_lite.core.tree import AnyTree, modules_by_path
from lora_lite.layers.access import module_at
from lora_lite.prepare.start import generator_for
from lora_lite.transforms.updates import Update, factored_update_of, lost, update_of
from lora_lite.variants.tokens import TokensConfig


@dataclass(frozen=True)
class Part:
    """An adapter to combine: its adapted model and its params."""

    adapt: Adapt
    params: AnyTree

    @functools.cached_property
    def entries(self) -> dict[str, tuple[Target, AdapterConfig]]:
        """Each target with its config by path."""
        return {target.path: (target, cfg) for target, cfg in self.adapt._plan.entries}

    def layer(self, path: str) -> Any:
        """Return a target's layer with its constants."""
        return self.adapt._plan.layer(*self.entries[path])

    def leaves(self, path: str) -> Params:
        """Return the params that reach a target."""
        return self.adapt._plan.leaves(self.params, path, self.entries[path][1])

    def constants(self, path: str) -> Constants:
        """Return a target's own constants."""
        return self.adapt._plan.constants[path]

    def additive(self, cfg: AdapterConfig) -> bool:
        """Whether the update is linear in the params of a target, by two random draws on the smallest target of the config."""
        if id(cfg) not in self._additive:
            paths = [path for path, (_, own) in self.entries.items() if own is cfg]
            self._additive[id(cfg)] = self._is_linear_in_params(min(paths, key=lambda p: self.entries[p][0].i * self.entries[p][0].o))
        return self._additive[id(cfg)]

    @functools.cached_property
    def _additive(self) -> dict[int, bool]:
        return {}

    def _is_linear_in_params(self, path: str) -> bool:
        generator = generator_for(0, path)
        W, (_, cfg) = self.layer(path), self.entries[path]
        shapes = self.adapt.shapes[path]
        a, b = (
            {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(W.device) for name, shape in shapes.items()}
            for _ in range(2)
        )
        of_sum = update_of(W, cfg, {name: 0.1 * a[name] - 0.2 * b[name] for name in a})
        of_a, of_b = update_of(W, cfg, a), update_of(W, cfg, b)
        return lost(of_sum, {name: 0.1 * of_a[name] - 0.2 * of_b[name] for name in of_a}) < 1e-9

    def shares(self, cfg: AdapterConfig) -> bool:
        """Whether targets of a config share tensors, frozen or trained."""
        return cfg.name in self.adapt._plan.shared or cfg.name in self.adapt._plan.shapes


@dataclass(frozen=True)
class Place:
    """A layer to adapt, with the number of each adapter that reaches it and its config there."""

    target: Target
    owners: tuple[tuple[int, AdapterConfig], ...]

    @property
    def path(self) -> str:
        """The layer's path."""
        return self.target.path

    @property
    def cfg(self) -> AdapterConfig:
        """The first adapter's config here."""
        return self.owners[0][1]

    @property
    def whole(self) -> bool:
        """Whether the update is that of a module's parameters, by name, since the module is no linear map."""
        return self.cfg.adapts != "linear"

    @property
    def rows(self) -> bool:
        """Whether the update is that of rows of a table alone, by token."""
        return all(isinstance(cfg, TokensConfig) for _, cfg in self.owners)

    def updates(self, parts: Sequence[Part]) -> list[Update]:
        """Return the update that each adapter makes here.

        Raises:
            ValueError: where a kind cannot tell.
        """
        return [self._update(parts[k], cfg) for k, cfg in self.owners]

    def _update(self, part: Part, cfg: Any) -> Update:
        leaves = part.leaves(self.path)
        if self.rows:
            return {str(token): row for token, row in zip(cfg.token_ids, leaves["dE"].detach().double())}
        return factored_update_of(part.layer(self.path), cfg, leaves)

    def fault(self) -> str | None:
        """Return the reason why no adapter can hold what these make of the layer. None where one can."""
        names = [type(cfg).__name__ for _, cfg in self.owners]
        bent = [type(cfg).__name__ for _, cfg in self.owners if not cfg.linear]
        if bent:
            return f"{bent[0]} is not linear in its input, so that it has no update of a weight"
        if len({cfg.adapts == "linear" for _, cfg in self.owners}) > 1:
            return f"{names[0]} and {names[-1]}: one trains it as a whole, the other adapts it as a linear layer"
        if self.target.shared_with and any(cfg.tied for _, cfg in self.owners) and not self.rows:
            return f"{listed(names)}: one moves its weight in {listed(self.target.shared_with)} too, where LoRA does not follow"
        return None


def places_of(parts: Sequence[Part]) -> list[Place]:
    """List the layers that adapters reach, in the model's order.

    Raises:
        ValueError: where the adapters are of other weights, or no adapter can hold what they make of a layer; it names each.
    """
    require_same_weights("combine", [part.adapt for part in parts])
    found: dict[str, list[tuple[int, AdapterConfig]]] = {}
    targets: dict[str, Target] = {}
    for k, part in enumerate(parts):
        for path, (target, cfg) in part.entries.items():
            targets.setdefault(path, target)
            found.setdefault(path, []).append((k, cfg))
    order = {path: n for n, path in enumerate(modules_by_path(parts[0].adapt._plan.base))}
    places = [Place(target, tuple(found[path])) for path, target in targets.items()]
    places.sort(key=lambda place: order.get(place.target.kind.host(place.path), 0))
    faults = [f'"{place.path}": {fault}' for place in places if (fault := place.fault())]
    whole = [place.path for place in places if place.whole]
    faults += [
        f'"{place.path}": it stands inside "{path}", which is trained as a whole in another adapter'
        for place in places
        for path in whole
        if place.path.startswith(f"{path}.")
    ]
    if faults:
        raise ValueError(
            f"combine: expected linear variants whose sum one adapter can hold, found:\n{several(faults)}\n"
            "Build the adapters without these layers, or run each adapter on its own."
        )
    return places


def require_same_weights(call: str, adapts: Sequence[Adapt]) -> None:
    """Raise unless adapters stand on the weights of the first, at their own targets.

    Raises:
        ValueError: it names each target whose weight is another.
    """
    first = adapts[0]._plan.base
    faults = []
    for k, adapt in enumerate(adapts):
        for target in adapt.targets if adapt._plan.base is not first else ():
            if not _same(_tensors(first, target), _tensors(adapt._plan.base, target)):
                faults.append(f'"{target.path}" of adapt {k}')
    if faults:
        raise ValueError(
            f"{call}: expected adapters over the same frozen weights, found other ones, or none, than in adapt 0:\n{several(faults)}\n"
            "Build or load each adapter on one model."
        )


def _tensors(base: Any, target: Target) -> dict[str, Tensor] | None:
    try:
        return module_at(base, target.kind.host(target.path)).state_dict(keep_vars=True)
    except AttributeError:
        return None


def _same(mine: dict[str, Tensor] | None, its: dict[str, Tensor] | None) -> bool:
    if mine is None or its is None or mine.keys() != its.keys():
        return False
    return all(_equal(t, its[name]) for name, t in mine.items())


def _equal(t: Any, other: Any) -> bool:
    if t is other or not isinstance(t, Tensor):
        return True
    if t.shape != other.shape or t.dtype != other.dtype:
        return False
    return t.is_meta or t.data_ptr() == other.data_ptr() or torch.equal(t, other.to(t.device))
