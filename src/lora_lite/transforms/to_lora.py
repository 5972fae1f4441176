"""`to_lora`: any linear variant as LoRA, by the SVD of its update of the weight."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, require_type, several
from lora_lite.core.leading import leading_svd
from lora_lite.core.plan import Target
from lora_lite.core.tracing import require_constant
from lora_lite.core.tree import Tree, tree_leaves
from lora_lite.layers.kind import Variant
from lora_lite.variants.lora import LoRAConfig


@made_alike
def to_lora(
    adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], r: int, alpha: float | None = None
) -> tuple[Adapt, Tree, dict[str, float]]:
    """Convert an adapter of linear variants to LoRA: the best approximation of its change of the weight that rank `r` allows.

    Args:
        adapt: the adapted model of the params.
        params: a tree that fits it.
        r: rank of the LoRA, the same for all targets.
        alpha: numerator of its scale, > 0; `r` by default, so that the scale is 1. The update does not depend on it.

    Returns:
        `(adapt, params, errors)`: an `Adapt` over the same frozen weights, its params in float32, and for each target the Frobenius norm of
        what is lost over that of the update.

    Raises:
        TypeError: where an argument is of another type, as in another order.
        ValueError: where `params` does not fit `adapt`, a variant is not linear, or it moves the bias; it names each target. For params of
            a `torch.func` transform.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapt = ll.build(model, ll.PiSSAConfig(r=2))
        >>> params = ll.tree_map(lambda p: p + 0.1, adapt.init(seed=0))
        >>> _, _, errors = ll.to_lora(adapt, params, r=4)
        >>> errors["0"] < 1e-6
        True
    """
    call = "to_lora(adapt, params, r)"
    require_type(isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)
    require_type(isinstance(params, Mapping), call, "params", "a params tree, e.g. adapt.init()", params)
    require_type(isinstance(r, int) and not isinstance(r, bool), call, "r", "an integer >= 1", r)
    adapt._require_whole("to_lora")
    adapt._require(params, "to_lora")
    require_constant(tree_leaves(params), "to_lora", "its factors")
    adapt._require_finite(params, "to_lora")
    cfg = LoRAConfig(
        r=r,
        alpha=float(r) if alpha is None else alpha,
        target_names=tuple(f"^{re.escape(target.path)}$" for target in adapt.targets),
        exclude_names=(),
    )
    if cfg.alpha <= 0:
        raise ValueError(f"to_lora: expected alpha > 0, found {alpha}. The singular values are divided by alpha / r.")
    tree: Tree = {}
    errors = {}
    for target, own, deltas, biases in _changes(adapt, params):
        pairs = [_factors(delta, cfg) for delta in deltas]
        given = iter(pairs)
        tree[target.path] = adapt._plan.layer(target, own).make(lambda _, given=given: dict(zip("AB", next(given))))
        lost = [delta - cfg.scale * B.to(delta.dtype) @ A.to(delta.dtype) for delta, (A, B) in zip(deltas, pairs)]
        errors[target.path] = _norm([*lost, *biases]) / max(_norm([*deltas, *biases]), torch.finfo(torch.float64).tiny)
    built = build(adapt._plan.base, cfg, remat=adapt._plan.remat, kinds=adapt._plan.kinds)
    return built, built._plan.ordered(tree), errors


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


@torch.no_grad()
def _changes(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[Target, AdapterConfig, list[Tensor], list[Tensor]]]:
    """Return the updates of the weights and biases of each target in float64, one of each for every linear map in it.

    The biases are zero up to rounding: more is refused.
    """
    faults, found = [], []
    for target, cfg in adapt._plan.entries:
        at = f'"{target.path}": {type(cfg).__name__}'
        if not cfg.linear:
            faults.append(f"{at} is not linear in its input")
            continue
        if cfg.tied and target.shared_with:
            faults.append(f"{at} moves {listed(target.shared_with)} too, which share the weight, where LoRA acts at one place")
            continue
        W = adapt._plan.layer(target, cfg)
        try:
            changes = W.changes(Variant(cfg), adapt._plan.leaves(params, target.path, cfg))
        except ValueError as e:
            faults.append(f"{at} {e}")
            continue
        scale = 1.0 if W.bias is None else float(W.bias.detach().abs().max())
        if any(not torch.allclose(bias, torch.zeros_like(bias), atol=1e-9 + 1e-6 * scale) for _, bias in changes):
            faults.append(f"{at} moves the bias, which LoRA cannot")
        found.append((target, cfg, [weight for weight, _ in changes], [bias for _, bias in changes]))
    if faults:
        raise ValueError(
            f"to_lora: expected variants that change the weight alone, found:\n{several(faults)}\n"
            "Leave these targets out when building, or keep the adapter as it is."
        )
    return found


def _factors(delta: Tensor, cfg: LoRAConfig) -> tuple[Tensor, Tensor]:
    """Return `A (r, i)` and `B (o, r)`, with zeros where the layer has fewer directions."""
    U, S, Vh = leading_svd(delta, min(cfg.r, *delta.shape), tolerance=1e-5)  # nothing that float32 would show
    root = (S / cfg.scale).sqrt()
    A, B = delta.new_zeros(cfg.r, delta.shape[1]), delta.new_zeros(delta.shape[0], cfg.r)
    A[: len(S)], B[:, : len(S)] = root[:, None] * Vh, U * root
    return A.to(cfg.dtype), B.to(cfg.dtype)
