"""`Plan`: all that a build decided, and what each variant's init derived from the frozen layers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.bind import Shapes
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Constants, Frozen
from lora_lite.core.progress import shown
from lora_lite.layers.parameter import layer_of
from lora_lite.prepare.targets import Target

Entries = tuple[tuple[Target, AdapterConfig], ...]


@dataclass(frozen=True)
class Plan:
    """Each target with its config, the shapes of its params and its constants, over a plain clone of the model."""

    base: nn.Module
    entries: Entries
    shapes: Shapes
    constants: Mapping[str, Constants]
    remat: str | None = None
    shared: Mapping[str, Constants] = field(default_factory=dict)
    sharding: Any = None  # shard.Sharding, where the base is split over processes

    def constants_at(self, path: str, cfg: AdapterConfig) -> Constants:
        """Give the constants that reach one target: its own, and those that all targets of its config share."""
        return {**self.shared.get(cfg.name, {}), **self.constants[path]}


@torch.no_grad()
def derive(
    base: nn.Module, entries: Entries, remat: str | None, stats: Mapping[str, Any] = MappingProxyType({}), progress: bool = False
) -> Plan:
    """Run each variant's init once, for its constants and the shapes of its params; with its statistics where it is calibrated."""
    shapes: Shapes = {}
    constants: dict[str, Constants] = {}
    for target, cfg in shown(entries, "init", progress):
        W = target.kind(layer_of(base, target.path))
        given = (stats[target.path],) if target.path in stats else ()
        try:
            params, frozen = start(cfg, W, generator_for(0, target.path), *given)
        except Exception as e:
            e.add_note(f'in {type(cfg).__name__}.init at target "{target.path}"')
            raise
        shapes[target.path] = {name: tuple(p.shape) for name, p in params.items()}
        constants[target.path] = {name: c.detach().to(W.device) for name, c in frozen.items()}
    return Plan(base, entries, shapes, constants, remat, share(base, entries))


def start(cfg: AdapterConfig, W: Frozen, generator: torch.Generator, *given: Any) -> tuple[Mapping[str, Tensor], Constants]:
    """Run a variant's init on a layer; of several linear maps on each, their params and constants stacked."""
    starts = [cfg.init(part, generator, *given) for part in W.parts]
    if not W.stacked:
        return starts[0]
    params, constants = zip(*starts)
    return _stacked(params), _stacked(constants)


def start_params(cfg: AdapterConfig, W: Frozen, generator: torch.Generator) -> dict[str, Tensor]:
    """Give the params that a variant's init makes for a layer, in the config's dtype and on the layer's device."""
    params, _ = start(cfg, W, generator)
    # Dense in memory, as params read from a file are: products of another layout may round otherwise.
    return {name: p.to(W.device, cfg.dtype, copy=True, memory_format=torch.contiguous_format) for name, p in params.items()}


def _stacked(trees: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def share(base: nn.Module, entries: Entries) -> dict[str, Constants]:
    """Ask each config for the constants that all its targets share; they stand once, under the variant's name.

    Raises:
        ValueError: where two configs of one variant would share different tensors under one name.
    """
    shared: dict[str, Constants] = {}
    configs = {id(cfg): cfg for _, cfg in entries}
    for key, cfg in configs.items():
        layers = [target.kind(layer_of(base, target.path)) for target, other in entries if id(other) == key]
        constants = cfg.share(layers)
        if constants and (cfg.name in shared or any(target.path == cfg.name for target, _ in entries)):
            raise ValueError(
                f'build: expected the constants that {type(cfg).__name__} shares to have the name "{cfg.name}" to themselves, found it '
                "taken by another config of the variant or by a layer. Use one config for all layers of the variant."
            )
        if constants:
            shared[cfg.name] = {name: c.to(layers[0].device) for name, c in constants.items()}
    return shared


def generator_for(seed: int, path: str) -> torch.Generator:
    """Give a target's own generator: the seed folded with its path.

    Raises:
        TypeError: where `seed` is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"adapt.init: expected seed as an integer, found {seed!r}. Use e.g. adapt.init(seed=0).")
    digest = hashlib.blake2b(f"{int(seed)}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
