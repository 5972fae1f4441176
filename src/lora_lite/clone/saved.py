"""The `save_pretrained` of a module that `adapt.module` made: it says what `from_pretrained` will not read."""

import functools
import warnings
from typing import Any

from torch import nn

from lora_lite.clone.adapter import adapters
from lora_lite.core.tree import modules_by_path

_SAVE = "save_pretrained"


def warn_when_saved(root: nn.Module) -> None:
    """Let each module with adapters warn where it is saved as a model, in place."""
    for module in modules_by_path(root).values():
        if callable(getattr(type(module), _SAVE, None)) and any(True for _ in adapters(module)):
            vars(module)[_SAVE] = functools.partial(_saved, module)


def _saved(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        f"{_SAVE}: the folder gets the base model, with the adapter's tensors beside it, which from_pretrained leaves out. Use "
        "ll.save(adapt, params, file), or load adapt.merge(params) into a copy of the model and save that.",
        stacklevel=2,
    )
    return getattr(type(module), _SAVE)(module, *args, **kwargs)
