"""PEFT's files of an adapter whose base model is not at hand: its layers are, as its own files tell of them, with weights of zeros."""

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.tree import join
from lora_lite.files.peft.parts import PREFIX
from lora_lite.files.peft.write import require_expressible, sorted_targets, tensors_of


def of_base(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[str]]:
    """List the targets of which PEFT's files hold something that the base model alone tells, by the reason.

    Tensors that depend on a weight are found by writing them for two weights.

    Args:
        adapt: the adapter's layers.
        params: a tree that fits them.

    Raises:
        ValueError: where PEFT cannot express the adapter, whatever the base model is.
    """
    found = sorted_targets(adapt)
    biased = [target.path for target, _ in found.as_bias]
    biased += [target.path for target, cfg in found.of_method if getattr(cfg, "bias", False)]
    if biased:
        return {"PEFT keeps a trained bias whole": biased}
    require_expressible(found, adapt)
    own, other = (tensors_of(one, params, found)[1] for one in (adapt, _of_other_weights(adapt)))
    differing = [key for key, t in own.items() if not torch.equal(t.nan_to_num(), other[key].nan_to_num())]
    paths = [t.path for t in adapt.targets if any(key.startswith(join(PREFIX + t.path, "")) for key in differing)]
    return {"PEFT keeps tensors that depend on the weight": paths} if paths else {}


def _of_other_weights(adapt: Adapt) -> Adapt:
    """Return the same layers with random weights. Modules trained as a whole keep their values, which the adapter's file has."""
    plan = adapt._plan
    base = copy.deepcopy(plan.base)
    generator = torch.Generator().manual_seed(0)
    for target, cfg in plan.entries:
        for p in base.get_submodule(target.path).parameters(recurse=False) if cfg.adapts == "linear" else ():
            p.data = torch.randn(p.shape, generator=generator).to(p)
    return Adapt(dataclasses.replace(plan, base=base))
