"""Models on several devices: the hooks of accelerate's `device_map`, carried into a clone.

accelerate sets a `forward` on the instance that moves the inputs to the layer's device and calls the forward of the class that the module
had. In a clone classes change, so there the same moves are torch's own hooks around whatever the class computes. Offloading, which fetches
weights for the length of one call, is not carried: the gradient needs them again after it. Told by name, so that accelerate is not
imported.
"""

import copy
import functools
from typing import Any

from torch import nn

from lora_lite.core.errors import listed
from lora_lite.core.tree import modules_by_path
from lora_lite.layers.access import ADOPTED


def moves_inputs(module: nn.Module) -> bool:
    """Whether a module's own `forward` is accelerate's and does no more than move inputs and outputs between devices."""
    return "forward" in vars(module) and "_old_forward" in vars(module) and _only_moves(vars(module).get("_hf_hook"))


def _only_moves(hook: Any) -> bool:
    if not type(hook).__module__.startswith("accelerate."):
        return False
    if type(hook).__name__ == "SequentialHook":
        return all(_only_moves(part) for part in hook.hooks)
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload and not hook.no_grad


def runs_class_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class. accelerate leaves that forward set on an instance whose hooks are removed."""
    forward = vars(module).get("forward")
    return (
        forward is None
        or ADOPTED in vars(module)
        or (getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward)
    )


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse a model whose weights accelerate fetches from the CPU or from disk for each call.

    Raises:
        ValueError: it names the layers.
    """
    fetched = [path or "the model" for path, module in modules_by_path(model).items() if _fetches(vars(module).get("_hf_hook"))]
    if fetched:
        raise ValueError(
            f"build: expected weights in memory, found layers that accelerate offloads at {listed(fetched)}. Load the model on its "
            "devices, or take the offloading off with accelerate.hooks.remove_hook_from_module(model, recurse=True); a model too large for "
            "one device can be split by adapt.shard."
        )


def _fetches(hook: Any) -> bool:
    return any(_fetches(part) for part in getattr(hook, "hooks", ())) or bool(getattr(hook, "offload", False))


def carry(copied: nn.Module) -> None:
    """Put the moves of a copied module into hooks, and remove accelerate's attributes from the instance."""
    state = vars(copied)
    hook = copy.copy(state["_hf_hook"])  # it notes the inputs' device from call to call
    for name in ("_hf_hook", "_old_forward", "forward"):
        del state[name]
    for name in [n for n, value in state.items() if hasattr(value, "__wrapped__") and hasattr(type(copied), n)]:
        del state[name]  # `to` and `cuda`, which would move the user's model
    # Inside the user's hooks, as accelerate's are: the last before the forward and the first after it.
    copied.register_forward_pre_hook(functools.partial(_before, hook), with_kwargs=True)
    copied.register_forward_hook(functools.partial(_after, hook), prepend=True)


def _before(hook: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return hook.pre_forward(module, *args, **kwargs)


def _after(hook: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return hook.post_forward(module, output)
