"""Derive each target's constants, once, and the shapes of its params: config -> `Plan`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lora_lite.clone.bind import Shapes
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Constants, Frozen
from lora_lite.core.plan import Entries, Plan
from lora_lite.core.progress import shown
from lora_lite.layers.parameter import layer_of
from lora_lite.prepare.start import generator_for, joined, start


@torch.no_grad()
def derive(
    base: nn.Module, entries: Entries, remat: str | None, stats: Mapping[str, Any] = MappingProxyType({}), progress: bool = False
) -> Plan:
    """Run each variant's `constants`, with its statistics where it is calibrated, and then its `init` for the shapes of its params."""
    shared = share(base, entries)
    shapes: Shapes = {}
    constants: dict[str, Constants] = {}
    for target, cfg in shown(entries, "init", progress):
        W = target.kind(layer_of(base, target.path))
        given = (stats[target.path],) if target.path in stats else ()
        with _noted(f'in {type(cfg).__name__}.constants at target "{target.path}"'):
            own = constants_of(cfg, W, generator_for(0, target.path), *given)
        constants[target.path] = {name: c.detach().to(W.device) for name, c in own.items()}
        filled = W.with_constants({**shared.get(cfg.name, {}), **constants[target.path]})
        with _noted(f'in {type(cfg).__name__}.init at target "{target.path}"'):
            params = start(cfg, filled, generator_for(0, target.path))
        shapes[target.path] = {name: tuple(p.shape) for name, p in params.items()}
    return Plan(base, entries, shapes, constants, remat, shared)


@contextmanager
def _noted(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        e.add_note(where)
        raise


def constants_of(cfg: AdapterConfig, W: Frozen, generator: torch.Generator, *given: Any) -> Constants:
    """Run a variant's `constants` on a layer; of several linear maps on each, stacked."""
    each = [cfg.constants(part, generator, *given) for part in W.parts]
    return joined(each) if W.stacked else each[0]


def share(base: nn.Module, entries: Entries) -> dict[str, Constants]:
    """Ask each config for the constants that all its targets share; they stand once, under the variant's name.

    Raises:
        ValueError: where two configs of one variant would share different tensors under one name.
    """
    shared: dict[str, Constants] = {}
    configs = {id(cfg): cfg for _, cfg in entries}
    for key, cfg in configs.items():
        layers: Sequence[Frozen] = [target.kind(layer_of(base, target.path)) for target, other in entries if id(other) == key]
        constants = cfg.share(layers)
        if constants and (cfg.name in shared or any(target.path == cfg.name for target, _ in entries)):
            raise ValueError(
                f'build: expected the constants that {type(cfg).__name__} shares to have the name "{cfg.name}" to themselves, found it '
                "taken by another config of the variant or by a layer. Use one config for all layers of the variant."
            )
        if constants:
            shared[cfg.name] = {name: c.to(layers[0].device) for name, c in constants.items()}
    return shared
