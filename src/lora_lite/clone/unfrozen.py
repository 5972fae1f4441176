"""The `requires_grad_` of a module that `adapt.module` made: its base weights are those of the user's model, and are not trained."""

import functools
import warnings
from typing import Any

from torch import nn

from lora_lite.clone.adapter import placeholders
from lora_lite.clone.state import modules_of_model

_SET = "requires_grad_"


def keep_frozen(root: nn.Module) -> None:
    """Let each module of a copy leave the tensors frozen that it shares with the user's model, in place."""
    for module in modules_of_model(root).values():
        vars(module)[_SET] = functools.partial(_set, module)


def _set(module: nn.Module, requires_grad: bool = True) -> Any:
    own = placeholders(module)
    frozen = [p for p in module.parameters() if p not in own and not p.requires_grad]
    getattr(type(module), _SET)(module, requires_grad)
    if not requires_grad or not frozen:
        return module
    for p in frozen:
        p.requires_grad_(False)
    warnings.warn(
        f"{_SET}: the module shares its base weights with the model it was built from, where a step would change them too. They stay "
        "frozen, and the adapter's parameters are set. To train whole layers, build with a FullConfig for them.",
        stacklevel=2,
    )
    return module
