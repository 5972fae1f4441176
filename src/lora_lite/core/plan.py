"""`Plan`: all that a build decided, and the records that it is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.frozen import Constants
from lora_lite.core.leading import Start

Shapes = dict[str, dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    Attributes:
        path: the module's path in the model; empty where the model is itself the layer.
        kind: the subclass of `lora_lite.Kind` that reads the layer.
        i, o: input and output width.
        role: `"reader"`, `"writer"` or `"inner"`; of a layer that is both, the first that the config asks for.
        shared_with: paths of other modules that hold the same weight.
    """

    path: str
    kind: Any
    i: int
    o: int
    role: str
    shared_with: tuple[str, ...] = ()

    def __str__(self) -> str:
        shared = f"  weight shared with {listed(self.shared_with)}" if self.shared_with else ""
        return f"{self.path}  {self.role}  ({self.o}, {self.i}){shared}"


class Targets(tuple[Target, ...]):
    """The targets of one config, in the model's order. Printing shows a line for each."""

    def __str__(self) -> str:
        return "\n".join([f"{len(self)} targets", *(f"  {t}" for t in self)])


Entries = tuple[tuple[Target, AdapterConfig], ...]


@dataclass(frozen=True)
class Plan:
    """Each target with its config, the shapes of its params and its constants, over a private copy of the model that is never called.

    Attributes:
        base: the copy.
        entries: each target with its config.
        shapes: the shapes of a params tree; tensors that targets share stand under their variant's name.
        constants: each target's own.
        remat: expression of the blocks that recompute.
        shared: the constants that all targets of a variant share, by the variant's name.
        sharding: how the base is split over processes, where it is.
        kinds: the user's own kinds, which whatever follows from this plan knows too.
        task_type: PEFT's name of the task, where the adapter came from a file of PEFT's that has one.
        starts: how the leading singular vectors of each target's start were found, where it is made of them.
    """

    base: nn.Module
    entries: Entries
    shapes: Shapes
    constants: Mapping[str, Constants]
    remat: str | None = None
    shared: Mapping[str, Constants] = field(default_factory=dict)
    sharding: Any = None
    kinds: Sequence[Any] = ()
    task_type: str | None = None
    starts: Mapping[str, Start] = field(default_factory=dict)

    def constants_at(self, path: str, cfg: AdapterConfig) -> Constants:
        """Return the constants that reach one target: its own, and those that all targets of its config share."""
        return {**self.shared.get(cfg.name, {}), **self.constants[path]}

    def layer(self, target: Target, cfg: AdapterConfig) -> Any:
        """Return a target's layer as its kind reads it in the copy, with its constants."""
        return target.kind.at(self.base, target.path, self.constants_at(target.path, cfg))

    def shared_params(self) -> set[str]:
        """Name the variants whose targets share trained tensors."""
        return set(self.shapes) - {target.path for target, _ in self.entries}
