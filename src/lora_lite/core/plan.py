"""`Plan`: all that a build decided, and the constants that each variant derived from the frozen layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_lite.clone.bind import Shapes
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Constants
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
        """Return the constants that reach one target: its own, and those that all targets of its config share."""
        return {**self.shared.get(cfg.name, {}), **self.constants[path]}
