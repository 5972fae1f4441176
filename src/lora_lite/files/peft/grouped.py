"""Params that groups of layers share, in PEFT's terms: a copy at each layer, and groups told by the ends of layers' names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.errors import listed
from lora_lite.core.plan import Plan, Shapes, Target
from lora_lite.files.peft.targeted import expression

Shape = tuple[int, int]

ALL = ("",)
"""The expressions of one group of all layers."""


def patterns_of(target_modules: Any) -> tuple[str, ...]:
    """Return the expressions of the groups that PEFT makes: one by an expression, else one by each name; none for names of modules."""
    if isinstance(target_modules, str):
        return () if target_modules == "all-linear" else ALL
    names = sorted(target_modules or (), key=lambda name: (-len(name), name))
    return tuple(rf"(^|\.){re.escape(name)}$" for name in names) if any("." in name for name in names) else ()


def fields_of(group_of: Callable[[str], str], targets: Sequence[Target], others: Iterable[str] | None) -> dict[str, Any]:
    """Return PEFT's fields that name layers so that it makes the same groups.

    Args:
        group_of: the group of a layer, by its path.
        targets: the layers, in order.
        others: the paths of all other modules; None where they are unknown, which one group alone does without.

    Raises:
        ValueError: where no such fields are there.
    """
    groups: dict[str, dict[Shape, list[str]]] = {}
    for target in targets:
        groups.setdefault(group_of(target.path), {}).setdefault((target.o, target.i), []).append(target.path)
    of_group = [[path for paths in group.values() for path in paths] for group in groups.values()]
    if others is None and len(groups) > 1:
        raise ValueError(
            f"to_peft: expected the base model, whose other layers the names of {len(groups)} groups must leave out, found none. "
            "Pass it: --base MODEL."
        )
    ends = [_own_end(group, [other for other in groups.values() if other is not group]) for group in groups.values()]
    if all(ends) and others is not None:
        besides = [path for path in others if any(f".{path}".endswith(f".{end}") for end in ends)]
        return {"target_modules": ends, **({"exclude_modules": expression(besides)} if besides else {})}
    if len(groups) == 1:
        return {"target_modules": expression(of_group[0])}
    raise ValueError(
        "to_peft: expected groups of layers that the ends of their names tell apart, as PEFT does, found\n"
        + "\n".join(f"  - {listed(members)}" for members in of_group)
        + "\nKeep the adapter with ll.save."
    )


def _own_end(group: Mapping[Shape, Sequence[str]], others: Iterable[Mapping[Shape, Sequence[str]]]) -> str | None:
    """Return the shortest end, in whole parts, that all paths of a group have, and by which PEFT makes the same groups; None for none.

    PEFT takes any end of a name, as `o` of `wo`. It splits by shape too, so that this is harmless for layers of one shape and group that
    all have the end, and whose shape none of this group has."""
    paths = [path for members in group.values() for path in members]
    rivals = [(shape, members) for other in others for shape, members in other.items()]
    parts = paths[0].split(".")
    for end in (".".join(parts[-n:]) for n in range(1, len(parts) + 1)):
        taken = [(shape, {path.endswith(end) for path in members}) for shape, members in rivals]
        harmless = all(found == {False} or (found == {True} and shape not in group) for shape, found in taken)
        if harmless and all(f".{path}".endswith(f".{end}") for path in paths):
            return end
    return None


def shapes_of(plan: Plan, paths: Iterable[str]) -> Shapes:
    """Return the shapes of the params as a file has them: those of groups at each layer. Other places keep theirs."""
    configs = {target.path: cfg for target, cfg in plan.entries}
    found = {}
    for path in paths:
        of_groups = plan.grouped(path, configs[path]) if path in configs else {}
        found[path] = {**{name: plan.shapes[place][there] for name, (place, there) in of_groups.items()}, **plan.shapes[path]}
    return found


def copies(plan: Plan, tree: Mapping[str, Mapping[str, Tensor]], path: str) -> dict[str, Tensor]:
    """Return a target's own params and copies of those that it shares with groups."""
    cfg = next(cfg for target, cfg in plan.entries if target.path == path)
    return {**{name: tree[place][there] for name, (place, there) in plan.grouped(path, cfg).items()}, **tree[path]}


def differing(plan: Plan, tree: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """List the layers whose copy of a group's param is another than that of the group's first layer."""
    return [
        f'"{path}": expected {name} as at "{first}", with which it shares it, found another. In PEFT an adapter that was added beside '
        "another shares nothing, and its file does not load as it was: train it as the first of its model"
        for path, names in plan.groups.items()
        for name, first in names.items()
        if not torch.equal(tree[path][name], tree[first][name])
    ]
