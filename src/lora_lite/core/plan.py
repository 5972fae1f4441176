"""`Plan`: all that a build decided, and the records that it is made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from torch import nn

from lora_lite.core.certificate import Start
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.frozen import Constants
from lora_lite.core.tree import join

Shapes = dict[str, dict[str, tuple[int, ...]]]
Groups = Mapping[str, Mapping[str, str]]
Places = Mapping[str, tuple[str, str]]


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


UNNAMED = "by target_names"
"""The reason for a layer that none of a config's names ask for."""


class Targets(tuple[Target, ...]):
    """The targets of one config, in the model's order. Printing shows a line for each. Where the config names none, it also
    shows the layers that were left out.

    Attributes:
        left_out: the reason for each layer of the config's site that it could have taken without naming it and did not take, by path.
    """

    left_out: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def of(cls, targets: Iterable[Target], left_out: Mapping[str, str]) -> Self:
        """Make the targets of a config, with the layers that it leaves out."""
        self = cls(targets)
        self.left_out = MappingProxyType(dict(left_out))
        return self

    def __reduce__(self) -> Any:  # a mapping proxy has no pickle
        return type(self).of, (tuple(self), dict(self.left_out))

    def __str__(self) -> str:
        unasked = {} if UNNAMED in self.left_out.values() else self.left_out
        reasons = {reason: [path for path, own in unasked.items() if own == reason] for reason in unasked.values()}
        left = [f"  left out, {reason}: {listed(path or 'the model' for path in paths)}" for reason, paths in reasons.items()]
        return "\n".join([f"{len(self)} targets", *(f"  {t}" for t in self), *left])


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
        groups: of targets that share params with a group, by path: each such param with the path of the group's first target.
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
    groups: Groups = field(default_factory=dict)
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

    def shared_params(self) -> list[str]:
        """Name the variants whose targets share trained tensors, in the order of a params tree."""
        paths = {target.path for target, _ in self.entries}
        return [name for name in self.shapes if name not in paths]

    def grouped(self, path: str, cfg: AdapterConfig) -> dict[str, tuple[str, str]]:
        """Return where the params of groups stand: by the target's own name of each, the place in a tree and the name there."""
        return {name: (cfg.name, join(first, name)) for name, first in self.groups.get(path, {}).items()}

    def places(self, path: str, cfg: AdapterConfig) -> Places:
        """Return where all params stand that a target shares, with a group or with all targets of its config."""
        common = {} if cfg.name in self.constants else self.shapes.get(cfg.name, {})  # else a target of that name has its own there
        of_all = {name: (cfg.name, name) for name in common if "." not in name}  # those of groups have a path before
        return {**of_all, **self.grouped(path, cfg)}

    def regrouped(self, tree: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return a tree in which each target has all its own params, with those of groups moved to their place, from the first target."""
        found = {path: dict(leaves) for path, leaves in tree.items()}
        for path, cfg in ((target.path, cfg) for target, cfg in self.entries if target.path in self.groups):
            for name, (place, there) in self.grouped(path, cfg).items():
                leaf = found[path].pop(name)
                found.setdefault(place, {}).setdefault(there, leaf)
        return found

    def ordered(self, tree: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return a tree in the order of `init`, since an optimiser's state knows leaves by their number."""
        return {path: {name: tree[path][name] for name in leaves} for path, leaves in self.shapes.items()}

    def leaves(self, tree: Mapping[str, Mapping[str, Any]], path: str, cfg: AdapterConfig) -> Mapping[str, Any]:
        """Return the leaves of a params tree, or of the shapes of one, that reach a target: its own, and those that it shares."""
        return reaching(tree, path, self.places(path, cfg))


def reaching(tree: Mapping[str, Mapping[str, Any]], path: str, places: Places) -> Mapping[str, Any]:
    """Return a target's own leaves of a tree, with those that stand at other places."""
    return {**{name: tree[place][there] for name, (place, there) in places.items()}, **tree[path]} if places else tree[path]
