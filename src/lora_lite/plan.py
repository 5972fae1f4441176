"""`Plan`: all that a build decided, and what each variant's init derived from the frozen layers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_lite.bind import Shapes
from lora_lite.config import AdapterConfig
from lora_lite.frozen import Constants
from lora_lite.targets import Target

Entries = tuple[tuple[Target, AdapterConfig], ...]


@dataclass(frozen=True)
class Plan:
    """Each target with its config, the shapes of its params and its constants, over a plain clone of the model."""

    base: nn.Module
    entries: Entries
    shapes: Shapes
    constants: Mapping[str, Constants]
    remat: str | None = None


@torch.no_grad()
def derive(base: nn.Module, entries: Entries, remat: str | None) -> Plan:
    """Run each variant's init once, for its constants and the shapes of its params."""
    shapes: Shapes = {}
    constants: dict[str, Constants] = {}
    for target, cfg in entries:
        W = target.kind(base.get_submodule(target.path))
        try:
            params, frozen = cfg.init(W, generator_for(0, target.path))
        except Exception as e:
            e.add_note(f'in {type(cfg).__name__}.init at target "{target.path}"')
            raise
        shapes[target.path] = {name: tuple(p.shape) for name, p in params.items()}
        constants[target.path] = {name: c.detach().to(W.device) for name, c in frozen.items()}
    return Plan(base, entries, shapes, constants, remat)


def generator_for(seed: int, path: str) -> torch.Generator:
    """Give a target's own generator: the seed folded with its path.

    Raises:
        TypeError: where `seed` is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"adapt.init: expected seed as an integer, found {seed!r}. Use e.g. adapt.init(seed=0).")
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
