"""Whether a kind from outside reads from its merged tensors the map that it was given."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lite.core.tracing import in_transform
from lora_lite.layers.kind import Kind, Variant
from lora_lite.layers.quantised import FrozenQuantised


def require_read_back(W: Kind, f: Variant, params: Mapping[str, Tensor]) -> None:
    """Refuse a kind that reads another map from its merged tensors than the adapted one: its layout loses something.

    Kinds whose modules keep the merged tensors elsewhere than in their own parameters are trusted, and so is a merge inside of a transform.

    Raises:
        ValueError: which names the kind's `to_weight`.
    """
    if W.site != "linear" or isinstance(W, FrozenQuantised) or in_transform() or W.device.type == "meta":
        return
    own, merged = W.layer._parameters, W.merged(f, params)
    if not merged or not set(merged) <= set(own):
        return
    twin = copy.copy(W)
    twin.layer = copy.copy(W.layer)
    held = {name: t if own[name].is_floating_point() else t.to(own[name].dtype) for name, t in merged.items()}
    vars(twin.layer)["_parameters"] = own | {name: nn.Parameter(t, requires_grad=False) for name, t in held.items()}
    for (update, _), (now, _), (was, _) in zip(W.changes(f, params), twin.pairs(params), W.pairs(params)):
        before = was.dense(torch.float64)
        if (now.dense(torch.float64) - before - update).norm() > 1e-2 * update.norm() + 1e-5 * before.norm():
            raise ValueError(
                f"{type(W).__name__}.to_weight: expected a layout from which weight reads the same matrix again, found another one read "
                "from the merged weight. Let to_weight undo what weight does, or define merged(f, params)"
            )
