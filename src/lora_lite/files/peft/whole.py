"""Modules trained as a whole in PEFT's files: `modules_to_save`, and the norms of LN-tuning. PEFT keeps full values, we displacements."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, several
from lora_lite.core.tree import Tree, join
from lora_lite.files.peft.layers import LOAD, same
from lora_lite.layers.find import find
from lora_lite.layers.module import ModuleKind
from lora_lite.variants.full import FullConfig
from lora_lite.variants.ln_tuning import LNTuningConfig

LN_TUNING = "LN_TUNING"
_NORM = "ln_tuning_layers."
Values = dict[str, dict[str, Tensor]]
"""The full values of modules, by path and parameter name."""
Whole = Mapping[type[AdapterConfig], Values]
"""The same by our config of the modules: `FullConfig`, or `LNTuningConfig` for norms."""


def split(
    model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[Whole, dict[str, Tensor], list[str]]:
    """Split a file's tensors into those of whole modules and the rest; with the faults of the former.

    PEFT writes a shared parameter under each of its names, and buffers. A module's config has no place for other buffers."""
    rest, whole, faults = dict(tensors), dict[type[AdapterConfig], Values](), list[str]()
    for config, path, module, mark in _modules(model, fields):
        first = {id(p): name for name, p in ModuleKind(module).parameters.items()}
        for name, own in _held(module):
            key = prefix + join(path, mark + name)
            tensor = rest.pop(key, None)
            if tensor is None:
                continue
            if id(own) in first:
                value = whole.setdefault(config, {}).setdefault(path, {}).setdefault(first[id(own)], tensor)
                faults += (
                    [] if torch.equal(value, tensor) else [f'"{key}": expected what "{first[id(own)]}" holds, which it is, found another']
                )
            elif not same(tensor, own):
                faults.append(f'"{key}": expected the model\'s own, as a buffer is not trained here, found another. {LOAD}')
    return whole, rest, faults


def _modules(model: nn.Module, fields: Mapping[str, Any]) -> Iterator[tuple[type[AdapterConfig], str, nn.Module, str]]:
    """Yield `(config, path, module, mark in its keys)` of every module that a file with these fields may hold in full."""
    for path in _asked(model, fields.get("modules_to_save") or []):
        yield FullConfig, path, model.get_submodule(path), ""
    if fields["peft_type"] != LN_TUNING:
        return
    norms = find(model, "norm")
    for path, module in model.named_modules():
        if module._parameters:
            yield LNTuningConfig if path in norms else FullConfig, path, module, _NORM


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List the tensors of a module's state dict, a shared parameter under each of its names."""
    return [(name, t) for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)]


def paths_of(whole: Whole) -> list[str]:
    """List the paths of all whole modules."""
    return [path for values in whole.values() for path in values]


def faults_of(model: nn.Module, fields: Mapping[str, Any], whole: Whole) -> list[str]:
    """List the modules that a file promises in full and lacks."""
    names, values = fields.get("modules_to_save") or [], whole.get(FullConfig, {})
    faults = [f'modules_to_save: expected the tensors of "{path}", found none' for path in _asked(model, names) if path not in values]
    if names and not values:
        faults = faults or [f"modules_to_save: expected modules of this model, found {listed(names)}"]
    return faults


def _asked(model: nn.Module, names: list[str]) -> list[str]:
    return [path for path, _ in model.named_modules() if path and any(path.endswith(name) for name in names)]


def configs_of(whole: Whole) -> list[AdapterConfig]:
    """Return the configs that adapt whole modules, one of a class."""
    return [config(target_names=tuple(f"^{re.escape(path)}$" for path in values)) for config, values in whole.items()]


def displacements(model: nn.Module, whole: Whole) -> Tree:
    """Return the params of modules whose full values PEFT saved. Parameters that the file leaves out did not move.

    Raises:
        ValueError: for a tensor of another shape; it lists each.
    """
    faults, params = [], dict[str, dict[str, Tensor]]()
    for path, saved in (entry for values in whole.values() for entry in values.items()):
        own = ModuleKind(model.get_submodule(path)).parameters
        faults += [
            f'"{join(path, n)}": expected {tuple(own[n].shape)}, found {tuple(t.shape)}'
            for n, t in saved.items()
            if t.shape != own[n].shape
        ]
        if not faults:
            now = {name: saved.get(name, p).detach().to(p.device).float() for name, p in own.items()}
            params[path] = {name: now[name] - p.detach().float() for name, p in own.items()}
    if faults:
        raise ValueError(
            f"from_peft: expected whole modules as this model has them, found:\n{several(faults)}\nGive the model these shapes first: by "
            "model.resize_token_embeddings(n) where the vocabulary was another, by num_labels=n for a classifier's head."
        )
    return params


def full_values(model: nn.Module, path: str, cfg: AdapterConfig, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one whole module as PEFT's file holds them, by key, its buffers among them."""
    module, mark = model.get_submodule(path), _NORM if isinstance(cfg, LNTuningConfig) else ""
    own = ModuleKind(module).parameters
    moved = {id(own[name]): (own[name] + delta.detach()).to(own[name].dtype) for name, delta in leaves.items()}
    return {join(path, mark + name): moved.get(id(t), t).detach().cpu() for name, t in _held(module)}


def ambiguous(model: nn.Module, path: str) -> list[str]:
    """List the modules that PEFT would train too when asked for `path`, since PEFT matches the end of a name."""
    return [other for other, _ in model.named_modules() if other != path and other.endswith(path)]
