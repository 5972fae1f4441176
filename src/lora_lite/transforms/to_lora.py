"""`to_lora`: any linear variant as LoRA, by the SVD of what it adds to the weight."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.clone.bind import layer_at
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import several
from lora_lite.core.frozen import Frozen, FrozenLinear
from lora_lite.core.linalg import truncated_svd
from lora_lite.core.tree import Tree
from lora_lite.derived.merge import merged_layer
from lora_lite.variants.lora import LoRAConfig


def to_lora(
    adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], r: int, alpha: float | None = None
) -> tuple[Adapt, Tree, dict[str, float]]:
    """Convert an adapter of linear variants to LoRA: the best approximation of its change of the weight that rank `r` allows.

    Args:
        adapt: what the params belong to.
        params: a tree that fits it.
        r: rank of the LoRA, the same for all targets.
        alpha: numerator of its scale, > 0; `r` by default, so that the scale is 1. The update does not depend on it.

    Returns:
        `(adapt, params, errors)`: an `Adapt` over the same frozen weights, its params in float32, and for each target the Frobenius norm of
        what is lost over that of the update.

    Raises:
        ValueError: where `params` does not fit `adapt`, a variant is not linear, or it moves the bias; it names each target.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapt = ll.build(model, ll.PiSSAConfig(r=2))
        >>> params = ll.tree_map(lambda p: p + 0.1, adapt.init(seed=0))
        >>> _, _, errors = ll.to_lora(adapt, params, r=4)
        >>> errors["0"] < 1e-6
        True
    """
    adapt._require_whole("to_lora")
    adapt._require(params, "to_lora")
    cfg = LoRAConfig(
        r=r,
        alpha=float(r) if alpha is None else alpha,
        target_names=tuple(f"^{re.escape(target.path)}$" for target in adapt.targets),
        exclude_names=(),
    )
    if cfg.alpha <= 0:
        raise ValueError(f"to_lora: expected alpha > 0, found {alpha}. The singular values are divided by alpha / r.")
    deltas = _deltas(adapt, params)
    tree: Tree = {}
    errors = {}
    for path, delta in deltas.items():
        A, B = tree_at = _factors(delta, cfg)
        tree[path] = dict(zip("AB", tree_at))
        lost = torch.linalg.matrix_norm(delta - cfg.scale * B.to(delta.dtype) @ A.to(delta.dtype))
        errors[path] = float(lost / torch.linalg.matrix_norm(delta).clamp_min(torch.finfo(delta.dtype).tiny))
    return build(adapt._plan.base, cfg, remat=adapt._plan.remat), tree, errors


@torch.no_grad()
def _deltas(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Give each target's change of the weight, `(o, i)`, in float64."""
    faults, deltas = [], {}
    for target, cfg in zip(adapt.targets, adapt.configs):
        at = f'"{target.path}": {type(cfg).__name__}'
        if not cfg.linear:
            faults.append(f"{at} is not linear in its input")
            continue
        W = layer_at(adapt._clone, target.path)._lora_lite.W
        if W.one_hot or W.stacked:
            faults.append(f"{at} is at {'an embedding' if W.one_hot else 'a stack of weights'}, which is not converted")
            continue
        delta, moved = _change(cfg, params[target.path], W)
        deltas[target.path] = delta
        if moved:
            faults.append(f"{at} moves the bias, which LoRA cannot")
    if faults:
        raise ValueError(
            f"to_lora: expected variants that change the weight alone, found:\n{several(faults)}\n"
            "Leave these targets out when building, or keep the adapter as it is."
        )
    return deltas


def _change(cfg: AdapterConfig, params: Mapping[str, Tensor], W: FrozenLinear) -> tuple[Tensor, bool]:
    weight = W.dense(torch.float64)
    bias = None if W.bias is None else W.bias.detach().to(torch.float64)
    exact = Frozen(weight, bias, W.constants)
    merged, offset = merged_layer(cfg, params, exact)
    held = torch.zeros_like(offset) if bias is None else bias
    return merged - weight, not torch.allclose(offset, held, rtol=1e-6, atol=1e-9)


def _factors(delta: Tensor, cfg: LoRAConfig) -> tuple[Tensor, Tensor]:
    """Give `A (r, i)` and `B (o, r)`, with zeros where the layer has fewer directions."""
    U, S, Vh = truncated_svd(delta, cfg.r)
    root = (S / cfg.scale).sqrt()
    A, B = delta.new_zeros(cfg.r, delta.shape[1]), delta.new_zeros(delta.shape[0], cfg.r)
    A[: len(S)], B[:, : len(S)] = root[:, None] * Vh, U * root
    return A.to(cfg.dtype), B.to(cfg.dtype)
