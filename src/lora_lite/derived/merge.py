"""Merge an adapter into dense weights, for every linear variant by its pure function. A kind knows its names and layout."""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, require_type, several
from lora_lite.core.frozen import Frozen
from lora_lite.core.memory import place_in_memory
from lora_lite.core.plan import Plan, Target
from lora_lite.core.tracing import require_constant, require_read
from lora_lite.core.tree import AnyTree, join, tree_leaves
from lora_lite.layers.identity import Release, at_identity, exact_dtype
from lora_lite.layers.kind import Variant
from lora_lite.layers.read_back import require_read_back


def merged_layer(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen) -> tuple[Tensor, Tensor]:
    """Return one linear map's merged `(o, i)` weight and `(o,)` bias, in at least float32, in evaluation mode."""
    weight, bias = (at_identity(Variant(cfg), params, W, role, exact_dtype(W.dtype)) for role in ("weight", "bias"))
    return weight, bias


@made_alike
@torch.no_grad()
def merge(plan: Plan, params: AnyTree, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the merged tensors of every target, named as in the model's state dict.

    Args:
        plan: whose targets to merge; only frozen tensors are read.
        params: the params tree.
        dtype: of the merged tensors; None for that of each layer's own, which for a quantised weight is float32.

    Raises:
        ValueError: for what `load_state_dict(..., strict=False)` would drop or spread in silence; it lists each case. For params by
            which `torch.func.grad` differentiates.
        TypeError: where `dtype` is no floating one.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"adapt.merge: expected a floating torch.dtype or None, found {dtype!r}. Use e.g. torch.float32.")
    require_constant(tree_leaves(params), "adapt.merge", "merged weights")
    faults: list[str] = []
    merged: dict[str, Tensor] = {}
    alone: dict[str, tuple[Target, bool]] = {}
    for target, cfg in plan.entries:
        try:
            for name, where, part, kept in merged_parts(plan, target, cfg, params):
                if not cfg.tied:
                    alone[name] = target, cfg.adapts == "module"
                if where is ...:
                    merged[name] = part.to(dtype or kept.dtype, memory_format=torch.contiguous_format)
                    continue
                if name not in merged:
                    merged[name] = part.new_empty(kept.shape, dtype=dtype or kept.dtype)  # mapped by vmap where it is
                merged[name][where] = part
        except Unmergeable as e:
            faults.append(e.fault)
    _refuse(faults or _moving_others(plan, alone, merged))
    return merged


def _moving_others(plan: Plan, targets: Mapping[str, tuple[Target, bool]], merged: Mapping[str, Tensor]) -> list[str]:
    """Return the targets with a merged tensor that would be written into another one of the model too, which lies in the same memory.

    A module that several paths lead to holds one tensor. A bias that two layers share is one tensor too, and belongs to both.

    Args:
        plan: of the base model.
        targets: of each merged tensor, and whether it is trained as a whole.
        merged: the state dict.
    """
    tensors = dict([*plan.base.named_parameters(remove_duplicate=False), *plan.base.named_buffers(remove_duplicate=False)])
    holders = {path: id(module) for path, module in plan.base.named_modules(remove_duplicate=False)}
    places = {name: place_in_memory(tensor) for name, tensor in tensors.items()}
    beside: dict[Hashable, list[str]] = {}
    for name, place in places.items():
        beside.setdefault(place.storage, []).append(name)
    faults = []
    for name, (target, whole) in targets.items():
        if (own := tensors.get(name)) is None:
            continue
        within = join(target.path, "") if whole else None  # the parameters of a whole module move together
        near = [n for n in beside[places[name].storage] if places[n].overlaps(places[name])]
        near = [n for n in near if within is None or not n.startswith(within)]
        others = [n for n in near if tensors[n] is not own or _holder(n, holders) != _holder(name, holders)]
        if others and not torch.equal(merged[name], own.to(merged[name].dtype)):
            faults.append(f'"{target.path}": {name} lies in the memory of {listed(others)}, which would change too')
    return faults


def _holder(name: str, holders: Mapping[str, int]) -> tuple[int, str]:
    """Return the module that holds a tensor of a state dict, by its `id`, and the tensor's name there."""
    path, _, own = name.rpartition(".")
    return holders[path], own


@torch.no_grad()
def merged_parts(
    plan: Plan, target: Target, cfg: AdapterConfig, params: AnyTree, release: Release = lambda: None
) -> Iterator[tuple[str, Any, Tensor, Tensor]]:
    """Yield the merged tensors of one target in parts: the tensor's name, the index and the values of a part, and the frozen tensor.

    Args:
        plan: of which only frozen tensors are read.
        target: one of its targets.
        cfg: the target's config.
        params: the params tree.
        release: called when a part of a weight has been read.

    Raises:
        Unmergeable: where a state dict cannot hold the adapted map, before the first part.
    """
    if reason := _unmergeable(target, cfg):
        raise Unmergeable(target, reason)
    W = plan.layer(target, cfg)
    try:
        kept = W.kept()
        for name, where, part in W.merged_parts(Variant(cfg), plan.leaves(params, target.path, cfg), release):
            if name not in kept:
                raise ValueError(
                    f"{target.kind.__name__}.merged returned {name!r}, which is none of {listed(kept)}. Correct the name, or define kept()"
                )
            if where is ... and part.shape != kept[name].shape:
                raise ValueError(
                    f"{target.kind.__name__}.merged returned {name!r} of shape {tuple(part.shape)}, found {tuple(kept[name].shape)} in the "
                    "module. Return it in the module's layout"
                )
            yield join(target.kind.host(target.path), name), where, part, kept[name]
        if not target.kind.__module__.startswith("lora_lite."):
            require_read_back(W, Variant(cfg), plan.leaves(params, target.path, cfg))
    except ValueError as e:
        raise Unmergeable(target, str(e)) from e


class Unmergeable(ValueError):
    """The reason why one target cannot be merged."""

    def __init__(self, target: Target, reason: str) -> None:
        self.fault = f'"{target.path}": {reason}'
        super().__init__(_refusal([self.fault]))


def refuse_unmergeable(plan: Plan) -> None:
    """Raise where the config or the place of a target forbids merging, which shows before anything is computed.

    Raises:
        ValueError: as `merge` does; it lists each case.
    """
    _refuse([f'"{t.path}": {reason}' for t, cfg in plan.entries if (reason := _unmergeable(t, cfg))])


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError(_refusal(faults))


def _refusal(faults: list[str]) -> str:
    return (
        f"merge: expected targets whose adapted map a state dict can hold, found:\n{several(faults)}\n"
        "Keep the adapter unmerged, or leave these targets out when building."
    )


def _unmergeable(target: Target, cfg: AdapterConfig) -> str | None:
    if not cfg.linear:
        return f"{type(cfg).__name__} is not linear in its input"
    if target.shared_with and not cfg.tied:
        others = ", ".join(path or "the model" for path in target.shared_with)
        return f"its weight is shared with {others}, which the merged one would change too"
    return None


@made_alike
@torch.no_grad()
def merge_error(plan: Plan, params: AnyTree, merged: Mapping[str, Tensor]) -> dict[str, float]:
    """Return for each target the distance of the merged tensors from the adapted map, over the size of the update.

    Distances are Frobenius norms. Where there is no update, they are taken over the size of the weight.

    Raises:
        ValueError: for targets that cannot be merged, and where `merged` lacks one of their tensors or holds it in another shape.
        TypeError: where `merged` holds no tensors.
    """
    held = isinstance(merged, Mapping) and all(isinstance(tensor, Tensor) for tensor in merged.values())
    require_type(held, "adapt.merge_error(params, merged)", "merged", "a state dict of tensors, as merge returns it", merged)
    require_read(tree_leaves(params), "merge_error")
    exact = merge(plan, params, torch.float64)
    if empty := [name for name, tensor in merged.items() if tensor.is_meta and name in exact and not exact[name].is_meta]:
        raise ValueError(f"merge_error: expected merged tensors with values, found {listed(empty)} on meta. Pass what merge returned.")
    faults = [name for name, tensor in exact.items() if name not in merged or merged[name].shape != tensor.shape]
    if faults:
        wanted = ", ".join(f'"{name}" of shape {tuple(exact[name].shape)}' for name in faults[:3])
        raise ValueError(f"merge_error: expected merged tensors {wanted}, found none or others. Pass what merge returned, in any dtype.")
    errors = {}
    for target, cfg in plan.entries:
        host = target.kind.host(target.path)
        kept = {join(host, name): t for name, t in plan.layer(target, cfg).kept().items()}
        before = {name: t for name, t in kept.items() if name in exact}
        missed, update, size = (
            _norm(exact[name] - other[name].double() for name in before)
            for other in (merged, before, {n: torch.zeros((), device="cpu") for n in before})
        )
        errors[target.path] = missed / (update or size)  # there is no update at the start
    return errors


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
