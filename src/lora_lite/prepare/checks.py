"""Checks before anything is copied: targets that cannot be adapted are refused by name, with the way out."""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.accelerate import moves_inputs, refuse_offloaded, runs_class_forward
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.frozen import USES
from lora_lite.core.plan import Entries, Plan, Target
from lora_lite.layers.access import module_at, renormed
from lora_lite.layers.find import packed
from lora_lite.layers.kind import Variant
from lora_lite.prepare.nested import refuse_nested
from lora_lite.prepare.worn import refuse_bound, refuse_worn


def check_entries(model: nn.Module, entries: Entries) -> None:
    """Refuse targets that their variants cannot adapt.

    Raises:
        ValueError: for a model that wears adapters, and for layers that are offloaded or split over processes, have a forward of their own,
            stand inside one another, or are of a kind that does not give what the variant uses; it names them.
    """
    _refuse_generator(model)
    refuse_bound(model)
    refuse_worn(model, [(target.path, cfg) for target, cfg in entries])
    refuse_offloaded(model, entries)
    _refuse_split(model, entries)
    _refuse_complex(model, entries)
    refuse_nested({target.path: target.kind for target, _ in entries})
    strange = [target.path for target, _ in entries if _strange(model, target)]
    if strange:
        cls = type(model.get_submodule(strange[0])).__name__
        if written := [path for path in strange if renormed(model.get_submodule(path))]:
            raise ValueError(
                f"build: expected layers that compute W x + b and leave W as it is, found max_norm at {listed(written)}, by which a lookup "
                "shortens rows of its table. Set max_norm to None and shorten them once, or leave such layers out with exclude_names."
            )
        raise ValueError(
            f"build: expected layers that compute W x + b, found a forward of its own at {listed(p or 'the model' for p in strange)} "
            f"({cls}). Leave them out with exclude_names, pass a kind that computes what the class does, kinds=(ItsKind,), or take a hook "
            "library's patch off first."
        )
    _refuse_sharers(model, entries)
    for target, cfg in entries:
        _refuse_packed(model, target, cfg)
        check_uses(target, cfg)


def _refuse_generator(model: nn.Module) -> None:
    """Refuse a model whose forward runs after its call has returned, when the call's params are no longer in place."""
    forward = model.forward
    if inspect.isgeneratorfunction(forward) or inspect.iscoroutinefunction(forward) or inspect.isasyncgenfunction(forward):
        raise ValueError(
            f"build: expected a model whose call returns its result, found that {type(model).__name__}.forward is a generator or a "
            "coroutine, which runs when the call is over. Build on a module inside, or on one whose forward returns list(...) of it."
        )


def _refuse_sharers(model: nn.Module, entries: Entries) -> None:
    """Refuse a tied variant where a module that shares its target's weight cannot be adapted with it, or is a target itself."""
    taken = {target.path: type(cfg).__name__ for target, cfg in entries}
    for target, cfg in entries:
        name = type(cfg).__name__
        for path in target.shared_with if cfg.tied else ():
            module = model.get_submodule(path)
            if path in taken:
                raise ValueError(
                    f'build: expected {name} to adapt all modules that share the weight of "{target.path}", found "{path}" claimed by '
                    f"{taken[path]}. Leave it out: it follows by itself."
                )
            if target.kind.at(model, target.path).sharer(module) is None:
                raise ValueError(
                    f'build: {name} cannot adapt "{target.path}": its weight is shared with "{path}" ({type(module).__name__}), which '
                    "could not follow. Give that module a weight of its own first."
                )


def _refuse_split(model: nn.Module, entries: Entries) -> None:
    """Refuse layers whose weights are not plain ones.

    DTensors, as FSDP2 and tensor parallelism make them, take no plain params beside them in an operation. Sparse tensors and those of
    oneDNN have no strides, by which a weight is read.
    """
    parts = {t.path: list(module_at(model, t.kind.host(t.path)).parameters(recurse=cfg.adapts == "module")) for t, cfg in entries}
    split = [path or "the model" for path, own in parts.items() if any(hasattr(p, "_local_tensor") for p in own)]
    if split:
        raise ValueError(
            f"build: expected whole weights, found weights that are split over processes (DTensor) at {listed(split)}. Build on the model "
            "before it is split, and split what build returns: adapt.shard(mesh), or fully_shard on adapt.module(params)."
        )
    parts = {path: [p for p in own if type(p.data) is Tensor and p.layout is not torch.strided] for path, own in parts.items()}
    sparse = [f"{path or 'the model'} ({own[0].layout})" for path, own in parts.items() if own]
    if sparse:
        raise ValueError(
            f"build: expected dense weights, found others at {listed(sparse)}. Make them dense, layer.weight = "
            "torch.nn.Parameter(layer.weight.to_dense()), or leave such layers out with exclude_names."
        )


def _refuse_complex(model: nn.Module, entries: Entries) -> None:
    """Refuse layers whose weights are complex. Real params reach a part of such a map, and most variants have no meaning there."""
    hosts = [(t, module_at(model, t.kind.host(t.path))) for t, cfg in entries if cfg.adapts != "module"]
    able = [t for t, host in hosts if any(p is not None and p.is_complex() for p in host._parameters.values())]
    dtypes = [(t.path or "the model", t.kind.at(model, t.path).dtype) for t in able]
    found = [f"{path} ({dtype})" for path, dtype in dtypes if dtype.is_complex]
    if found:
        raise ValueError(
            f"build: expected real weights, found complex ones at {listed(found)}, of which real params would reach a part. Leave "
            "such layers out with exclude_names, or hold the real and the imaginary part in layers of their own."
        )


def _strange(model: nn.Module, target: Target) -> bool:
    layer = module_at(model, target.kind.host(target.path))
    if target.kind.fault(layer) is not None:
        return False  # the copy is refused, with a better reason
    return not (runs_class_forward(layer) or moves_inputs(layer)) or not target.kind.faithful(layer)


def _refuse_packed(model: nn.Module, target: Target, cfg: AdapterConfig) -> None:
    """Refuse to train whole modules whose weights are quantised: a bias would be all that is left to train."""
    inside = packed(model.get_submodule(target.path), target.path) if cfg.adapts == "module" else []
    if inside:
        raise ValueError(
            f'build: expected modules with floating weights for {type(cfg).__name__} at "{target.path}", found quantised ones at '
            f"{listed(inside)}, which cannot be trained. Leave them out, or adapt them by a variant of linear layers, e.g. LoRAConfig."
        )


def check_uses(target: Target, cfg: AdapterConfig) -> None:
    """Refuse a variant that uses a part which the target's kind lacks.

    Raises:
        ValueError: it names the target, the reason and the way out.
    """
    kind, name = target.kind, type(cfg).__name__
    unknown = sorted(set(cfg.uses) - set(USES))
    if unknown:
        raise ValueError(f"{name}.uses: expected words among {listed(USES)}, found {listed(unknown)}. Change the class variable.")
    dropped = "drops inputs" if cfg._drops == ("dropout",) else f"draws {' and '.join(cfg._drops)} in a call"
    wanted = USES | {"inputs": "is calibrated on the layer's inputs", "dropout": dropped}
    uses = set(cfg.uses) | ({"inputs"} if cfg.calibrated else set()) | ({"dropout"} if cfg._drops else set())
    lacking = [wanted[use] for use in wanted if use in uses and use not in kind.gives]
    if not kind.sees_inputs and not cfg.linear:
        lacking.append("is not linear in its input")
    if lacking:
        raise ValueError(
            f'build: {name} cannot adapt "{target.path}" ({kind.__name__}): it {"; it ".join(lacking)}. '
            f"{kind.why or 'The kind gives less.'} Leave the layer out with exclude_names, or {_instead(kind, cfg, uses)}."
        )


def check_shifts(plan: Plan) -> None:
    """Refuse a variant that adds to the output of a weight which the model reads.

    Raises:
        ValueError: it names the target, the reason and the way out.
    """
    for target, cfg in plan.entries:
        if target.kind.takes_shifts or (W := plan.layer(target, cfg)).device.type == "meta":
            continue
        if W.shifts(Variant(cfg), plan.leaves(plan.shapes, target.path, cfg)):
            options = [f"{name}=False" for name in ("bias", "lora_bias") if getattr(cfg, name, False)]
            way = f"set {' and '.join(options)}" if options else "adapt it by a config of its own, e.g. LoRAConfig"
            raise ValueError(
                f'build: {type(cfg).__name__} cannot adapt "{target.path}" ({target.kind.__name__}): it adds to the output of a layer. '
                f"{target.kind.why} Leave the layer out with exclude_names, or {way}."
            )


def check_steered(plan: Plan) -> None:
    """Refuse a variant of which a strength would scale no tensor, since `steered` names none that it has.

    Raises:
        ValueError: it names the target, the names and those that there are.
    """
    for target, cfg in plan.entries:
        if cfg.steered is None or type(cfg).steer is not AdapterConfig.steer:
            continue
        names = {name.rpartition(".")[2] for name in plan.leaves(plan.shapes, target.path, cfg)}
        if names and not names & set(cfg.steered):
            raise ValueError(
                f'{type(cfg).__name__}.steered: expected names among {listed(sorted(names))}, those of its params at "{target.path}", '
                f"found {listed(cfg.steered) or 'none'}. Correct the class variable, or set it to None to scale all."
            )


def _instead(kind: Any, cfg: AdapterConfig, uses: set[str]) -> str:
    """Name the ways to adapt such a layer: the config without dropout if that is the only fault, else other variants."""
    from lora_lite.variants import VARIANTS  # here, since the configs are checked by this

    if uses - set(kind.gives) == {"dropout"}:
        return f"adapt it by a config of its own without dropout: {', '.join(f'{name}=0.0' for name in cfg._drops)}"
    able = [
        c for c in VARIANTS.values() if c.adapts == cfg.adapts and not c.calibrated and not c.original and set(c().uses) <= set(kind.gives)
    ]
    able.sort(key=lambda c: len(dataclasses.fields(c)))  # first those without sizes that have to fit the layer
    found = [c for c in able if type(cfg) is not c]
    names = [c.__name__ for c in dict.fromkeys((*found[:2], *(c for c in found if c.name == "lora")))]
    return f"adapt it by a config of its own: {', '.join(names)}" if names else "adapt other layers"
