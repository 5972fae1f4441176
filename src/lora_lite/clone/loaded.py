"""The `load_state_dict` of a module that `adapt.module` made: its base weights are those of the user's model, which stays as it is."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.state import modules_of_model, volatile
from lora_lite.core.errors import listed
from lora_lite.core.tree import join

_ASIDE = "_lora_lite_aside"


def keep_shared(root: nn.Module) -> None:
    """Let each module of a copy refuse other values for the tensors that it shares with the user's model, in place."""
    for path, module in modules_of_model(root).items():
        buffers = {name: b for name, b in module._buffers.items() if b is not None and not volatile(b, module.training)}
        held = {**{name: p for name, p in module._parameters.items() if p is not None}, **buffers}
        if shared := {name: tensor.data_ptr() for name, tensor in held.items() if _plain(tensor)}:
            module.register_load_state_dict_pre_hook(functools.partial(_before, path, shared))
            module.register_load_state_dict_post_hook(_after)


def _before(path: str, shared: Mapping[str, int], module: nn.Module, given: Mapping[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    if metadata.get("assign_to_params_buffers", False):
        own = vars(module)  # the assignment drops stand-ins for weights that the model reads
        own[_ASIDE] = {name: own[name] for name in shared if name in own}
        return
    tables = {**module._parameters, **module._buffers}
    others = [name for name, place in shared.items() if _would_write(tables.get(name), place, given.get(prefix + name))]
    if others:
        raise ValueError(
            f"load_state_dict: expected the base weights that the module shares with the model it was built from, found others at "
            f"{listed(join(path, name) for name in others)}. They would be written into that model. Load the adapter's tensors alone, "
            "with strict=False, pass assign=True, which gives this module weights of its own, or build on the other base."
        )


def _after(module: nn.Module, incompatible: Any) -> None:
    vars(module).update(vars(module).pop(_ASIDE, {}))


def _plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and type(tensor.data) is Tensor and not tensor.is_meta


def _would_write(own: Any, place: int, given: Any) -> bool:
    """Whether a tensor is still at its shared place, and would get other bytes. Those of other classes and shapes are left to torch."""
    if not _plain(own) or not _plain(given) or own.data_ptr() != place or own.shape != given.shape:
        return False
    return not torch.equal(*(t.detach().to(own.device, own.dtype).reshape(-1).view(torch.uint8) for t in (own, given)))
