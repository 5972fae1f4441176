"""Models on several devices: the hooks of accelerate's `device_map`, carried into a clone.

accelerate sets a `forward` on the instance that moves the inputs to the layer's device and calls the forward of the class that the module
had. In a clone classes change, so there the same moves are torch's own hooks around whatever the class computes. Its offloading fetches the
weights of a layer for the length of one call, but the gradient needs them again after it: in a clone each product fetches its own. Told by
name, so that accelerate is not imported.
"""

import copy
import functools
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from lora_lite.clone.offloaded import fetch_in_place
from lora_lite.core.errors import listed
from lora_lite.core.plan import Entries
from lora_lite.core.tree import modules_by_path
from lora_lite.layers.access import ADOPTED, module_at


def moves_inputs(module: nn.Module) -> bool:
    """Whether a module's own `forward` is accelerate's and does no more than move inputs, outputs and weights between devices."""
    return "forward" in vars(module) and "_old_forward" in vars(module) and _only_moves(vars(module).get("_hf_hook"))


def _only_moves(hook: Any) -> bool:
    parts = list(_parts(hook))
    return bool(parts) and all(type(part).__name__ == "AlignDevicesHook" and not part.no_grad for part in parts)


def _parts(hook: Any) -> Iterator[Any]:
    """Yield the hooks that one of accelerate's stands for: itself, or those of a sequence."""
    if type(hook).__name__ == "SequentialHook":
        for part in hook.hooks:
            yield from _parts(part)
    elif type(hook).__module__.startswith("accelerate."):
        yield hook


def runs_class_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class. accelerate leaves that forward set on an instance whose hooks are removed."""
    forward = vars(module).get("forward")
    return (
        forward is None
        or ADOPTED in vars(module)
        or (getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward)
    )


def refuse_offloaded(model: nn.Module, entries: Entries) -> None:
    """Refuse configs that cannot adapt a model whose weights accelerate offloads to the CPU or to disk.

    Raises:
        ValueError: for packed weights, and for variants that follow a shared weight, which offloading parts; for weights on meta that
            nothing fetches, beside others that have data. It names the layers.
    """
    fetched = {path: module for path, module in modules_by_path(model).items() if any(part.offload for part in _hooks_of(module))}
    _refuse_emptied(model, fetched)
    packed = [path for path, m in fetched.items() if any(p.is_meta and not p.is_floating_point() for p in m.parameters(recurse=False))]
    if packed:
        raise ValueError(
            f"build: expected quantised weights in memory, found layers that accelerate offloads at {listed(packed)}. Load the model on "
            "its devices, or take the offloading off with accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    shapes = {tuple(p.shape) for m in fetched.values() for p in m.parameters(recurse=False) if p.is_meta}
    # Offloading may leave no trace of a shared weight: the same shape is enough.
    held = ((t, module_at(model, t.kind.host(t.path))) for t, cfg in entries if cfg.tied)
    tied = [t.path for t, module in held if shapes & {tuple(p.shape) for p in module.parameters()}]
    if tied:
        raise ValueError(
            "build: expected weights in memory where all modules with the same weight follow a variant, found that accelerate offloads "
            f"those of {listed(tied)} or of its like, which may part them. Load the model on its devices, or take the offloading off with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )


def _refuse_emptied(model: nn.Module, fetched: Collection[str]) -> None:
    """Refuse a model of which a part has lost its data: accelerate leaves weights on meta when it no longer offloads them to disk."""
    tensors = list(model.named_parameters())
    empty = [name for name, p in tensors if p.is_meta and not any(name.startswith(f"{path}." if path else "") for path in fetched)]
    if empty and len(empty) < len(tensors):
        raise ValueError(
            f"build: expected weights with data, found them on meta at {listed(empty)}, beside others that have data. Load the model "
            "again, whole or with accelerate's hooks left on."
        )


def _hooks_of(module: nn.Module) -> list[Any]:
    return [part for part in _parts(vars(module).get("_hf_hook")) if type(part).__name__ == "AlignDevicesHook"]


def carry(copied: nn.Module) -> None:
    """Put the moves of a copied module into hooks, and remove accelerate's attributes from the instance."""
    state = vars(copied)
    for part in _hooks_of(copied):
        if part.offload:
            fetch_in_place(copied, part)
    hook = _own(state["_hf_hook"])
    for name in ("_hf_hook", "_old_forward", "forward"):
        del state[name]
    for name in [n for n, value in state.items() if hasattr(value, "__wrapped__") and hasattr(type(copied), n)]:
        del state[name]  # `to` and `cuda`, which would move the user's model
    # Inside the user's hooks, as accelerate's are: the last before the forward and the first after it.
    copied.register_forward_pre_hook(functools.partial(_before, hook), with_kwargs=True)
    copied.register_forward_hook(functools.partial(_after, hook), prepend=True)


def _own(hook: Any) -> Any:
    """Copy a hook, which notes the inputs' device from call to call. The copy leaves weights alone."""
    own = copy.copy(hook)
    if hasattr(own, "hooks"):
        own.hooks = tuple(map(_own, own.hooks))
    own.offload = False
    return own


def _before(hook: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return hook.pre_forward(module, *args, **kwargs)


def _after(hook: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return hook.post_forward(module, output)
