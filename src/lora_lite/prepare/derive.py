"""From targets to a plan: each variant's constants and the shapes of its params, derived from the frozen layers once."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_lite.core.alike import made_alike
from lora_lite.core.certificate import Start
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.frozen import Constants, Frozen, Params
from lora_lite.core.leading import noted, worst
from lora_lite.core.plan import Entries, Groups, Plan, Shapes
from lora_lite.core.progress import shown
from lora_lite.core.tracing import untransformed, valueless
from lora_lite.core.tree import Tree, flatten
from lora_lite.core.written import written
from lora_lite.layers.access import module_at
from lora_lite.prepare.checks import check_shifts, check_steered
from lora_lite.prepare.start import generator_for, own_start, placed, require_paths, require_tensors, start_params

T = TypeVar("T")


@untransformed
@made_alike
@torch.no_grad()
def derive(
    base: nn.Module,
    entries: Entries,
    remat: str | None,
    stats: Mapping[str, Any] = MappingProxyType({}),
    progress: bool = False,
    kinds: Sequence[Any] = (),
) -> Plan:
    """Derive each variant's constants, with its statistics where it is calibrated, and from a start the shapes of its params."""
    shapes: Shapes = {}
    constants: dict[str, Constants] = {}
    starts: dict[str, Start] = {}
    common, shared_shapes = share(base, entries)
    allotted, groups = allot(base, entries), groups_of(base, entries)
    for target, cfg in shown(entries, "init", progress):
        given = allotted.get(target.path, {})
        W = target.kind.at(base, target.path, common.get(cfg.name, {}))
        generators = (generator_for(0, target.path) for _ in range(2))  # each as if it were the only one
        layer = module_at(base, target.kind.host(target.path))
        with _noted(layer, f'{type(cfg).__name__}.constants at target "{target.path}"'), noted() as found:
            of = functools.partial(own_constants, cfg, generator=next(generators), stats=stats.get(target.path), given=given)
            own = W.make(of)
        W = W.with_constants({**common.get(cfg.name, {}), **own})
        with _noted(layer, f'{type(cfg).__name__}.init at target "{target.path}"'), noted() as first:
            params = W.make(functools.partial(own_start, cfg, generator=next(generators)))
        shapes[target.path] = {name: tuple(p.shape) for name, p in params.items()}
        if found or first:
            starts[target.path] = worst([*found, *first])
        constants[target.path] = {name: c.detach().to(W.device) for name, c in own.items()}
    for tree in (shapes, constants):
        flatten(tree)  # which refuses names that files could not tell apart
    _require_apart(entries, shapes, shared_shapes)
    _require_groups(entries, shapes, groups)
    plan = Plan(base, entries, {}, constants, remat, common, groups, kinds=tuple(kinds), starts=starts)
    plan = replace(plan, shapes=plan.regrouped({**shapes, **shared_shapes}))
    check_shifts(plan)
    check_steered(plan)
    return plan


def share(base: nn.Module, entries: Entries) -> tuple[dict[str, Constants], Shapes]:
    """Derive for each config the constants and the shapes of the params that all its targets share.

    Raises:
        ValueError: where two configs of one variant would share different tensors under one name.
    """
    common: dict[str, Constants] = {}
    shapes: Shapes = {}
    named: set[str] = set()
    for cfg in {id(cfg): cfg for _, cfg in entries}.values():
        own: Any = type(cfg)
        by_group = own.share_groups is not AdapterConfig.share_groups
        if not by_group and own.share is AdapterConfig.share and own.share_init is AdapterConfig.share_init:
            continue
        layers = layers_of(base, entries, cfg)
        constants = _of_finite(cfg, layers, functools.partial(made_alike(cfg.share), layers))
        require_tensors(constants, f"{own.__name__}.share")
        params = shared_start(cfg, layers, 0)
        if constants or params or by_group:
            _require_own_name(cfg, entries, named)
            named.add(cfg.name)
        if constants:
            common[cfg.name] = {name: c.to(layers[0].device) for name, c in constants.items()}
        if dotted := [name for name in params if "." in name]:  # as those of groups are named
            raise ValueError(f"{own.__name__}.share_init: expected names without dots, found {listed(dotted)}. Rename the tensors.")
        if params:
            shapes[cfg.name] = {name: tuple(p.shape) for name, p in params.items()}
    return common, shapes


def _require_own_name(cfg: AdapterConfig, entries: Entries, named: AbstractSet[str]) -> None:
    """Refuse a variant whose shared tensors have no name to themselves: `named` are those of other configs."""
    if any(target.path == cfg.name for target, _ in entries):
        by, way = "a target of that name", "Rename that module, or leave it out with exclude_names."
    elif cfg.name in named:
        by, way = "another config of the variant", "Use one config for all layers of the variant."
    else:
        return
    raise ValueError(
        f'build: expected the tensors that {type(cfg).__name__} shares to have the name "{cfg.name}" to themselves, found it taken '
        f"by {by}. {way}"
    )


def _require_apart(entries: Entries, shapes: Shapes, shared: Shapes) -> None:
    """Refuse params of `init` under the name of one of `share_init`: the shared tensor would be trained and never used."""
    for target, cfg in entries:
        if both := sorted({*shapes[target.path]} & {*shared.get(cfg.name, {})}):
            name = type(cfg).__name__
            raise ValueError(
                f"build: expected {name}.share_init and {name}.init to return tensors of other names, found {listed(both)} in both at "
                f'"{target.path}". Rename one.'
            )


def _require_groups(entries: Entries, shapes: Shapes, groups: Groups) -> None:
    """Refuse groups that share a tensor which a target has not, or has in another shape than the first."""
    for target, cfg in entries:
        where = f'{type(cfg).__name__}.share_groups at "{target.path}"'
        for name, first in groups.get(target.path, {}).items():
            own, begun = (shapes.get(path, {}).get(name) for path in (target.path, first))
            if own is None:
                raise ValueError(
                    f"{where}: expected a name among those of init, {listed(shapes[target.path])}, found {name!r}. Correct it."
                )
            if own != begun:
                found = f"shape {begun}" if begun is not None else "none"
                raise ValueError(
                    f'{where}: expected {name!r} of shape {own} at the first target of its group too, "{first}", found {found}. Put '
                    "targets into one group only where their tensors are of one shape."
                )


@made_alike
def allot(base: nn.Module, entries: Entries) -> dict[str, Constants]:
    """Derive the constants of each target that depend on all targets of its config."""
    allotted: dict[str, Constants] = {}
    for cfg in {id(cfg): cfg for _, cfg in entries}.values():
        if type(cfg).allot is not AdapterConfig.allot:
            paths = [target.path for target, other in entries if other is cfg]
            layers = layers_of(base, entries, cfg)
            found = _of_finite(cfg, layers, functools.partial(cfg.allot, dict(zip(paths, layers))))
            require_paths(found, paths, f"{type(cfg).__name__}.allot")
            for path in paths:
                require_tensors(found.get(path, {}), f'{type(cfg).__name__}.allot at "{path}"')
            allotted |= found
    return allotted


def groups_of(base: nn.Module, entries: Entries) -> Groups:
    """Find the targets that share params with a group of targets, and the first target of each group."""
    groups: dict[str, Mapping[str, str]] = {}
    for cfg in {id(cfg): cfg for _, cfg in entries}.values():
        if type(cfg).share_groups is not AdapterConfig.share_groups:
            paths = [target.path for target, other in entries if other is cfg]
            found = cfg.share_groups(dict(zip(paths, layers_of(base, entries, cfg))))
            require_paths(found, paths, f"{type(cfg).__name__}.share_groups")
            for path, names in found.items():
                if not isinstance(names, Mapping):
                    raise TypeError(
                        f'{type(cfg).__name__}.share_groups at "{path}": expected a mapping from names of params to the path of the '
                        f"group's first target, found {names!r}. Return a dict, empty for a target that shares none."
                    )
            groups |= found
    return groups


def layers_of(base: nn.Module, entries: Entries, cfg: AdapterConfig) -> list[Any]:
    """Read the layers of a config whose targets share tensors.

    Raises:
        ValueError: where one holds a stack of linear maps, each of which would take a part of the shared tensors for its own; it is named.
    """
    layers = {target.path: target.kind.at(base, target.path) for target, other in entries if other is cfg}
    for path, W in layers.items():
        maps: list[Frozen] = []
        made = W.make(functools.partial(_noted_map, maps))
        if {name: t.dim() for name, t in made.items()} != {"": 1}:
            held = f"{len(maps)} linear maps" if len(maps) > 1 else "a stack of one linear map"
            raise ValueError(
                f'build: {type(cfg).__name__} cannot adapt "{path}": its layers share tensors, and this one holds {held}, such as experts. '
                "Leave it out with exclude_names, or adapt it by a config whose layers share none, e.g. LoRAConfig."
            )
    return list(layers.values())


def _noted_map(maps: list[Frozen], one: Frozen) -> Params:
    maps.append(one)
    return {"": torch.empty(0)}


@untransformed
@made_alike
def drawn(plan: Plan, seed: int) -> Tree:
    """Draw fresh params of a plan, each target's from a generator of its own, seeded by `seed` and its path."""
    tree: Tree = {}
    for target, cfg in plan.entries:
        tree[target.path] = start_params(cfg, plan.layer(target, cfg), generator_for(seed, target.path))
    for name in plan.shared_params():
        cfg = next(cfg for _, cfg in plan.entries if cfg.name == name)
        layers = layers_of(plan.base, plan.entries, cfg)
        tree[name] = {leaf: placed(p, layers[0].device, cfg.dtype) for leaf, p in shared_start(cfg, layers, seed).items()}
    return plan.regrouped(tree)


@made_alike
def shared_start(cfg: AdapterConfig, layers: Sequence[Any], seed: int) -> Mapping[str, torch.Tensor]:
    """Draw the params that all targets of a config share."""
    params = cfg.share_init(layers, generator_for(seed, cfg.name))
    require_tensors(params, f"{type(cfg).__name__}.share_init", trained=True)
    return params


@made_alike
def own_constants(
    cfg: AdapterConfig, W: Frozen, generator: torch.Generator, stats: Any = None, given: Params = MappingProxyType({})
) -> Constants:
    """Run a variant's `constants` on one linear map, with statistics where there are any, beside those that it was allotted.

    They are laid out as those of a file will be: products of a decomposition's own layout round otherwise on some processors.
    """
    W = W.with_constants({**W.constants, **given}) if given else W
    found = _of_finite(cfg, [W], lambda: cfg.constants(W, generator) if stats is None else cfg.constants(W, generator, stats))
    require_tensors(found, f"{type(cfg).__name__}.constants")
    return {**given, **{name: c.contiguous() for name, c in found.items()}}


def _of_finite(cfg: AdapterConfig, layers: Sequence[Frozen], make: Callable[[], T]) -> T:
    """Return the constants that `make` derives from layers.

    A decomposition of a weight with inf or nan fails, or returns a basis of no meaning without a word.

    Raises:
        ValueError: for such a weight, where the config reads weights; and for weights without values, where it computes with them.
    """
    try:
        found = make()
    except torch.linalg.LinAlgError as e:
        _require_finite(cfg, layers, e)
        raise
    except RuntimeError as e:
        if any(valueless(W.weight) for W in layers):
            raise ValueError(
                f"build: {type(cfg).__name__} computes its start from values, found weights without any, as on meta or under "
                "FakeTensorMode. Build on the loaded model, or with a config that needs none, e.g. LoRAConfig."
            ) from e
        raise
    if found and "dense" in cfg.uses:
        _require_finite(cfg, layers)
    return found


def _require_finite(cfg: AdapterConfig, layers: Sequence[Frozen], cause: Exception | None = None) -> None:
    if not all(map(_finite, (W.dense() for W in layers))):
        raise ValueError(
            f"{type(cfg).__name__}: expected a finite weight to start from, found inf or nan. Load the model's weights anew, in a dtype "
            "that holds them, or leave such layers out with exclude_names."
        ) from cause


def _finite(weight: Tensor) -> bool:
    """Whether a weight has no inf and no nan, which both of its extremes show: in one pass, where `isfinite` makes tensors of its size."""
    return valueless(weight) or not weight.numel() or all(bool(extreme.isfinite()) for extreme in weight.aminmax())


@contextmanager
def _noted(layer: nn.Module, where: str) -> Iterator[None]:
    """Note on an error where it arose. Refuse a method that writes to the layer's weights."""
    names = written(dict(layer.named_parameters()))
    try:
        yield
    except Exception as e:
        e.add_note(f"in {where}")
        raise
    if names():
        raise RuntimeError(
            f"{where}: expected a method that reads the layer's weights, found that it wrote to {names()}, the user's. Load the weights "
            "again, and compute with a copy: W.dense().clone()."
        )
