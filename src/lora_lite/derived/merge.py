"""Merge an adapter into dense weights, for every linear variant by its pure function. A kind knows its names and layout."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import several
from lora_lite.core.frozen import Frozen
from lora_lite.core.plan import Plan, Target
from lora_lite.core.tree import AnyTree, join
from lora_lite.layers.identity import at_identity, exact_dtype
from lora_lite.layers.kind import Variant


def merged_layer(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen) -> tuple[Tensor, Tensor]:
    """Return one linear map's merged `(o, i)` weight and `(o,)` bias, in at least float32, in evaluation mode."""
    weight, bias = (at_identity(Variant(cfg), params, W, role, exact_dtype(W.dtype)) for role in ("weight", "bias"))
    return weight, bias


@torch.no_grad()
def merge(plan: Plan, params: AnyTree, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the merged tensors of every target, named as in the model's state dict.

    Args:
        plan: whose targets to merge; only frozen tensors are read.
        params: the params tree.
        dtype: of the merged tensors; None for that of each layer's own, which for a quantised weight is float32.

    Raises:
        ValueError: for what `load_state_dict(..., strict=False)` would drop or spread in silence; it lists each case.
    """
    faults: list[str] = []
    merged: dict[str, Tensor] = {}
    for target, cfg in plan.entries:
        try:
            W, found = _merged(plan, target, cfg, params)
        except _Fault as e:
            faults.append(f'"{target.path}": {e}')
            continue
        kept = W.kept()
        host = target.kind.host(target.path)
        for name, value in found.items():
            merged[join(host, name)] = value.to(dtype or kept[name].dtype, memory_format=torch.contiguous_format)
    _refuse(faults)
    return merged


class _Fault(Exception):
    """Why one target cannot be merged."""


def refuse_unmergeable(plan: Plan) -> None:
    """Raise where the config or the place of a target forbids merging, which shows before anything is computed.

    Raises:
        ValueError: as `merge` does; it lists each case.
    """
    _refuse([f'"{t.path}": {reason}' for t, cfg in plan.entries if (reason := _unmergeable(t, cfg))])


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError(
            f"merge: expected targets whose adapted map a state dict can hold, found:\n{several(faults)}\n"
            "Keep the adapter unmerged, or leave these targets out when building."
        )


def _unmergeable(target: Target, cfg: AdapterConfig) -> str | None:
    if not cfg.linear:
        return f"{type(cfg).__name__} is not linear in its input"
    if target.shared_with and not cfg.tied:
        return f"its weight is shared with {', '.join(target.shared_with)}, which the merged one would change too"
    return None


def _merged(plan: Plan, target: Target, cfg: AdapterConfig, params: AnyTree) -> tuple[Any, dict[str, Tensor]]:
    if reason := _unmergeable(target, cfg):
        raise _Fault(reason)
    W = plan.layer(target, cfg)
    try:
        W.kept()
        return W, W.merged(Variant(cfg), plan.leaves(params, target.path, cfg))
    except ValueError as e:
        raise _Fault(str(e)) from e


def merge_error(plan: Plan, params: AnyTree, merged: Mapping[str, Tensor]) -> dict[str, float]:
    """Return for each target the distance of the merged tensors from the adapted map, over the size of the update.

    Distances are Frobenius norms. Where there is no update, they are taken over the size of the weight.

    Raises:
        ValueError: for targets that cannot be merged, and where `merged` lacks one of their tensors or holds it in another shape.
    """
    exact = merge(plan, params, torch.float64)
    faults = [name for name, tensor in exact.items() if name not in merged or merged[name].shape != tensor.shape]
    if faults:
        wanted = ", ".join(f'"{name}" of shape {tuple(exact[name].shape)}' for name in faults[:3])
        raise ValueError(f"merge_error: expected merged tensors {wanted}, found none or others. Pass what merge returned, in any dtype.")
    errors = {}
    for target, cfg in plan.entries:
        host = target.kind.host(target.path)
        before = {join(host, name): t for name, t in plan.layer(target, cfg).kept().items()}
        missed, update, size = (
            _norm(exact[name] - other[name].double() for name in before)
            for other in (merged, before, {n: torch.zeros((), device="cpu") for n in before})
        )
        errors[target.path] = missed / (update or size)  # there is no update at the start
    return errors


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
