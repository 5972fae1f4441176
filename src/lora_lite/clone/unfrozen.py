"""The base weights of a module that `adapt.module` made are those of the user's model, and stay frozen, whoever sets `requires_grad`."""

import functools
import warnings
from typing import Any

from torch import Tensor, nn

from lora_lite.clone.adapter import placeholders
from lora_lite.clone.state import modules_of_model

_SET = "requires_grad_"


def keep_frozen(root: nn.Module) -> None:
    """Let each module of a copy leave the tensors frozen that it shares with the user's model, in place.

    A parameter that is set by hand is found by its first gradient, which it loses: no call has to look for it.
    """
    for module in modules_of_model(root).values():
        vars(module)[_SET] = functools.partial(_set, module)
    own = placeholders(root)
    for p in root.parameters():
        if p not in own and p.is_floating_point() and not p.is_inference():
            p.requires_grad_(True).register_post_accumulate_grad_hook(_freeze)  # torch takes no hook of a frozen one
            p.requires_grad_(False)


def _set(module: nn.Module, requires_grad: bool = True) -> Any:
    own = placeholders(module)
    frozen = [p for p in module.parameters() if p not in own and not p.requires_grad]
    getattr(type(module), _SET)(module, requires_grad)
    if not requires_grad or not frozen:
        return module
    for p in frozen:
        p.requires_grad_(False)
    _warn(_SET, "and the adapter's parameters are set", 2)
    return module


def _freeze(p: Tensor) -> None:
    p.grad = None
    p.requires_grad_(False)
    _warn("requires_grad", "and the gradient is dropped", 1)


def _warn(what: str, so: str, level: int) -> None:
    warnings.warn(
        f"{what}: the module shares its base weights with the model it was built from, where a step would change them too. They stay "
        f"frozen, {so}. To train whole layers, build with a FullConfig for them.",
        stacklevel=level + 1,
    )
