"""Modules at several places of a model: PEFT replaces a layer at the first alone; here a layer is adapted wherever it runs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lite.core.tree import join


def other_places(model: nn.Module, path: str) -> list[str]:
    """Return the other places at which the module at `path` is registered.

    A module inside one that stands at several places is itself registered once: PEFT replaces it at all of them.
    """
    module, found = model.get_submodule(path), list[str]()
    for parent, holder in model.named_modules():
        found += [join(parent, name) for name, child in holder._modules.items() if child is module]
    return [place for place in found if place != path] if len(found) > 1 else []


def fault(model: nn.Module, path: str) -> str | None:
    """Return why PEFT's files cannot hold a target at `path`, and the way out; None where they can."""
    others = other_places(model, path) if path else []
    if not others:
        return None
    return (
        f'"{path}": the layer stands at "{others[0]}" too, where PEFT leaves it as it is. Give each place a layer of its own first: '
        f'model.set_submodule("{others[0]}", copy.deepcopy(model.get_submodule("{path}")))'
    )


def _moved(model: nn.Module, prefix: str) -> dict[str, str]:
    """Map the beginning of each name at a later place of a module to that at its first."""
    first: dict[int, str] = {}
    places = [(path, first.setdefault(id(module), path)) for path, module in model.named_modules(remove_duplicate=False)]
    return {f"{prefix}{path}.": f"{prefix}{other}." for path, other in places if path != other}


def at_first_place(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors to the first place of their module, and list those that differ from the ones there."""
    moved = _moved(model, prefix)
    if not moved:
        return dict(tensors), []
    found: dict[str, Tensor] = {}
    faults = []
    for name, tensor in tensors.items():
        start = max((s for s in moved if name.startswith(s)), key=len, default=None)
        own = name if start is None else moved[start] + name[len(start) :]
        if own in tensors and own != name and not torch.equal(tensors[own], tensor):
            faults.append(f'"{name}": expected what "{own}" holds, since they are of one module, found another')
        found[own] = tensors.get(own, tensor)
    return found, faults
