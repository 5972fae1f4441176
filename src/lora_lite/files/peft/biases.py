"""Biases that PEFT trains in place beside LoRA, `bias="all"` and `bias="lora_only"`: it keeps full values, we displacements."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.plan import Target
from lora_lite.core.tree import Tree, join
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind
from lora_lite.variants.bitfit import BitFitConfig

ADAPTED = "base_layer.bias"
"""The key of the bias of a layer that has a LoRA too."""
Tensors = dict[str, Tensor]


def split(model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensors, Tensors, Tensors]:
    """Split a file's tensors: the biases of adapted layers by key, those of other modules that have moved by path, and the rest."""
    adapted, others, rest = Tensors(), Tensors(), dict(tensors)
    for path, module in model.named_modules() if fields.get("bias") in ("all", "lora_only") else ():
        own = module._parameters.get("bias")
        for key, found in ((join(path, ADAPTED), adapted), (join(path, "bias"), others)):
            saved = rest.get(prefix + key)
            if own is None or saved is None or saved.shape != own.shape:  # the last is told as a tensor without a place
                continue
            del rest[prefix + key]
            if found is adapted:
                adapted[prefix + key] = saved
            elif not torch.equal(saved.to(own), own):
                others[path] = saved
    return adapted, others, rest


def of_layers(model: nn.Module, others: Mapping[str, Tensor], kinds: Sequence[type[Kind]]) -> tuple[Tree, dict[str, Tensors]]:
    """Split biases without a LoRA: the params of BitFit at linear layers, and the values of other modules, norms for one."""
    linear = find(model, "linear", kinds)
    params, values = Tree(), dict[str, Tensors]()
    for path, saved in others.items():
        if path in linear:
            own: Any = model.get_submodule(path).bias
            params[path] = {"db": saved.to(own.device).float() - own.detach().float()}
        else:
            values[path] = {"bias": saved}
    return params, values


def beside(entries: Iterable[tuple[Target, AdapterConfig]]) -> list[tuple[Target, AdapterConfig]]:
    """List the targets of BitFit that a file of LoRA holds as trained biases; none where there is no LoRA."""
    every = list(entries)
    biases: list[tuple[Target, AdapterConfig]] = [(target, cfg) for target, cfg in every if isinstance(cfg, BitFitConfig)]
    return biases if len(biases) < len(every) else []


def saved(model: nn.Module, target: Target, leaves: Mapping[str, Tensor]) -> Tensors:
    """Return the full value of a bias by its key."""
    own: Any = model.get_submodule(target.path).bias
    return {join(target.path, "bias"): (own + leaves["db"].detach()).to(own.dtype).cpu()}


def fault(model: nn.Module, target: Target, cfg: AdapterConfig) -> str | None:
    """Return the reason why PEFT cannot train the bias that a config asks for, or None."""
    asked = isinstance(cfg, BitFitConfig) or getattr(cfg, "bias", False)
    layer: Any = model.get_submodule(target.kind.host(target.path))
    return "the layer has no bias for PEFT to train" if asked and layer._parameters.get("bias") is None else None
