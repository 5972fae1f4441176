"""Biases that PEFT trains in place beside LoRA, `bias="all"` and `bias="lora_only"`: it keeps full values, we displacements."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.plan import Target
from lora_lite.core.tree import Tree, join
from lora_lite.files.peft.layers import LOAD, same
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind
from lora_lite.variants.bitfit import BitFitConfig

ADAPTED = "base_layer.bias"
"""The key of the bias of a layer that has a LoRA too."""
Tensors = dict[str, Tensor]


class Biases(NamedTuple):
    """The tensors of a file, with its biases apart.

    Attributes:
        adapted: biases of layers that have a LoRA too, by key.
        others: those of other modules that have moved, by path.
        rest: all other tensors.
        faults: biases that would move where nothing trains them.
    """

    adapted: Tensors
    others: Tensors
    rest: Tensors
    faults: list[str]


def split(model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, trained: bool) -> Biases:
    """Split a file's tensors. `trained` says whether the variant of adapted layers has a bias; else theirs have to be the model's own."""
    adapted, others, rest, faults = Tensors(), Tensors(), dict(tensors), list[str]()
    for path, module in model.named_modules() if fields.get("bias") in ("all", "lora_only") else ():
        own = module._parameters.get("bias")
        for key, found in ((join(path, ADAPTED), adapted), (join(path, "bias"), others)):
            saved = rest.get(prefix + key)
            if own is None or saved is None or saved.shape != own.shape:  # the last is told as a tensor without a place
                continue
            del rest[prefix + key]
            if found is adapted and trained:
                adapted[prefix + key] = saved
            elif same(saved, own):
                continue
            elif found is adapted:
                faults.append(f'"{prefix + key}": expected the model\'s own, as this variant trains no bias, found another. {LOAD}')
            else:
                others[path] = saved
    return Biases(adapted, others, rest, faults)


def without_copies(
    model: nn.Module, modules: Mapping[str, Tensors], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[Tensors, list[str]]:
    """Leave out the biases of whole modules that `bias="all"` repeats: those of PEFT's copy, and of the module that it leaves unused."""
    rest, faults = dict(tensors), list[str]()
    for path, values in modules.items():
        own = dict(model.get_submodule(path).named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in model.get_submodule(path).named_parameters()}  # the name by which `values` has a shared one
        start = re.compile(rf"{re.escape(prefix + path)}\.(original_module|modules_to_save(?:\.default)?)\.(.*bias)")
        for key, found in [(key, found) for key in tensors if (found := start.fullmatch(key))]:
            unused = found[1] == "original_module"
            held = own.get(found[2]) if unused else values.get(first.get(id(own.get(found[2])), ""))
            if not same(rest.pop(key), held):
                whose = f"the model's own, found another. {LOAD}" if unused else f'what "{prefix + path}.{found[2]}" holds, found another'
                faults.append(f'"{key}": expected {whose}')
    return rest, faults


def of_layers(model: nn.Module, found: Biases, prefix: str, kinds: Sequence[type[Kind]]) -> tuple[Tree, dict[str, Tensors]]:
    """Split biases without a LoRA: the params of BitFit at linear layers, and the values of other modules, norms for one."""
    linear, others = find(model, "linear", kinds), found.others
    params, values = Tree(), dict[str, Tensors]()
    trained = others | {key.removeprefix(prefix).removesuffix(f".{ADAPTED}"): saved for key, saved in found.adapted.items()}
    of_linear = {id(model.get_submodule(path)._parameters["bias"]): trained[path] for path in trained if path in linear}
    for path, saved in others.items():
        again = of_linear.get(id(model.get_submodule(path)._parameters["bias"]))
        if path not in linear and again is not None and torch.equal(saved, again):
            continue  # a second name of a layer's bias, as the head of a BERT has one
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
