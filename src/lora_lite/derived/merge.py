"""Merge an adapter into dense weights, derived for every linear variant from its pure function: `b' = f(0)`, `W' = f(I) - b'`."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_lite.clone.bind import apply_variant, layer_at
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import several
from lora_lite.core.frozen import Frozen
from lora_lite.core.plan import Entries
from lora_lite.core.tree import join
from lora_lite.layers.embedding import FrozenEmbedding
from lora_lite.layers.module import FrozenModule
from lora_lite.layers.parameter import Held
from lora_lite.layers.quantised import FrozenQuantised
from lora_lite.prepare.targets import Target


def merged_layer(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen) -> tuple[Tensor, Tensor]:
    """Give one layer's merged `(o, i)` weight and `(o,)` bias, in at least float32.

    The function is evaluated on the rows of the identity, in evaluation mode.
    """
    weight = W.dense()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bias = None if W.bias is None else W.bias.to(dtype)
    layer = Frozen(weight.to(dtype), bias, W.constants)
    eye = torch.eye(W.in_features, dtype=dtype, device=weight.device)
    offset = apply_variant(cfg, params, layer, torch.zeros_like(eye[0]))
    return (apply_variant(cfg, params, layer, eye) - offset).t(), offset


def merged_table(cfg: AdapterConfig, params: Mapping[str, Tensor], W: FrozenEmbedding) -> tuple[Tensor, Tensor]:
    """Give the adapted lookup of every token as a weight `(o, vocab)`, in at least float32, and a bias of zeros.

    One-hot inputs sum to one, so what a variant adds to every output is part of the table.
    """
    exact = W.to(torch.promote_types(W.dtype, torch.float32))
    table = apply_variant(cfg, params, exact, torch.arange(W.in_features, device=W.device))
    return table.t(), table.new_zeros(W.out_features)


def merged_target(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen) -> tuple[Tensor, Tensor]:
    """Give a target's merged weight and bias, stacked where it is several linear maps."""
    if isinstance(W, FrozenEmbedding):
        return merged_table(cfg, params, W)
    merged = [merged_layer(cfg, p, part) for p, part in zip(W.split(params), W.parts)]
    if not W.stacked:
        return merged[0]
    weights, biases = zip(*merged)
    return torch.stack(weights), torch.stack(biases)


def merge(
    clone: nn.Module,
    entries: Entries,
    params: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Give the merged tensors of every target, named as in the model's state dict.

    Args:
        clone: a bound clone; only its frozen tensors are read.
        entries: each target with its config.
        params: the params tree.
        dtype: of the merged tensors; None for that of each layer's own, which for a quantised weight is float32.

    Raises:
        ValueError: for what `load_state_dict(..., strict=False)` would drop or spread in silence; it lists each case.
    """
    faults: list[str] = []
    merged: dict[str, Tensor] = {}
    for target, cfg in entries:
        W = layer_at(clone, target.path)._lora_lite.W
        fault = _unmergeable(target, cfg, layer_at(clone, target.path), W)
        if fault:
            faults.append(fault)
            continue
        if isinstance(W, FrozenModule):
            merged |= {join(target.path, name): (p + params[target.path][name]).to(dtype or p.dtype) for name, p in W.parameters.items()}
            continue
        with torch.no_grad():
            weight, bias = merged_target(cfg, params[target.path], W)
        names = _names(target, layer_at(clone, target.path))
        merged[names["weight"]] = W.to_weight(weight).to(dtype or W.dtype).contiguous()
        if W.bias is not None:
            merged[names["bias"]] = bias.to(dtype or W.bias.dtype)
        elif bias.any():
            faults.append(f'"{target.path}": the adapter moves the bias, and the layer has none to hold it')
    if faults:
        raise ValueError(
            f"merge: expected targets whose adapted map is one dense layer, found:\n{several(faults)}\n"
            "Keep the adapter unmerged, or leave these targets out when building."
        )
    return merged


def _names(target: Target, layer: nn.Module) -> dict[str, str]:
    """Name a target's weight and bias as the model's state dict does; a bare parameter has its own name."""
    if isinstance(layer, Held):
        return {"weight": target.path, "bias": f"{target.path}_bias"}
    return {name: join(target.path, name) for name in ("weight", "bias")}


def merge_error(
    clone: nn.Module,
    entries: Entries,
    params: Mapping[str, Mapping[str, Tensor]],
    merged: Mapping[str, Tensor],
) -> dict[str, float]:
    """Give by target how far the merged tensors are from the adapted map, over the size of the update.

    By Frobenius norms; where there is no update, over the size of the weight.

    Raises:
        ValueError: for targets that cannot be merged, and where `merged` lacks one of their tensors or holds it in another shape.
    """
    exact = merge(clone, entries, params, torch.float64)
    faults = [name for name, tensor in exact.items() if name not in merged or merged[name].shape != tensor.shape]
    if faults:
        wanted = ", ".join(f'"{name}" of shape {tuple(exact[name].shape)}' for name in faults[:3])
        raise ValueError(f"merge_error: expected merged tensors {wanted}, found none or others. Pass what merge gave, in any dtype.")
    errors = {}
    for target, _ in entries:
        W = layer_at(clone, target.path)._lora_lite.W
        names = {} if isinstance(W, FrozenModule) else _names(target, layer_at(clone, target.path))
        before = {names.get(n, join(target.path, n)): W.to_weight(p) if n == "weight" else p for n, p in W.parameters.items()}
        missed, update, size = (
            _norm(exact[name] - other[name].double() for name in before) for other in (merged, before, {n: torch.zeros(()) for n in before})
        )
        errors[target.path] = missed / (update or size)  # there is no update at the start
    return errors


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def _unmergeable(target: Target, cfg: AdapterConfig, layer: nn.Module, W: Frozen) -> str | None:
    if not cfg.linear:
        return f'"{target.path}": {type(cfg).__name__} is not linear in its input'
    if target.shared_with:
        return f'"{target.path}": its weight is shared with {", ".join(target.shared_with)}, which the merged one would change too'
    if "weight" not in layer._parameters and not isinstance(W, FrozenModule | FrozenQuantised):
        return f'"{target.path}": its weight is computed by a parametrization, so no entry of a state dict holds it'
    return None
