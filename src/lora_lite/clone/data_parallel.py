"""Replicas of a module that `adapt.module` made, as `nn.DataParallel` makes them for each call.

torch copies each module's `__dict__` and sets copies of the parameters as attributes. The bindings in it are still those of the original,
and run its layers. So a replica's first call leads them, and every other reference inside, to the replica, and lays its tensors into the
tables where the bindings look for them.
"""

import functools
from typing import Any

from torch import Tensor, nn

from lora_lite.clone.bind import Binding
from lora_lite.clone.listing import Table, keep_lists, show_lists
from lora_lite.clone.reads import bindings
from lora_lite.clone.references import References
from lora_lite.layers.access import ReadTensor

_TABLES = ("_parameters", "_buffers", "_modules")
_OWN = "_replicate_for_data_parallel"
_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if hasattr(value, "copy")) - set(_TABLES)


def replicable(root: nn.Module) -> None:
    """Let a bound module be replicated by `nn.DataParallel`, in place."""
    vars(root)[_OWN] = functools.partial(_replicated, root)


def _replicated(root: nn.Module) -> nn.Module:
    """Return a replica that has no tensors yet: torch sets them, and the first call uses them."""
    replica: nn.Module = type(root)._replicate_for_data_parallel(root)
    vars(replica)["forward"] = functools.partial(_first_call, root, replica)
    return replica


def _first_call(root: nn.Module, replica: nn.Module, *args: Any, **kwargs: Any) -> Any:
    _settle(root, replica)
    return replica.forward(*args, **kwargs)


def _settle(root: nn.Module, replica: nn.Module) -> None:
    pairs = _pairs(root, replica, {})
    copies = {id(module): other for module, other in pairs.items()}
    refs = References(copies, lambda tensor: tensor)
    held = [(name, v) for module in pairs for name, v in vars(module).items() if name not in _HOOKS and name not in _TABLES]
    stand_ins = [(module, name, v) for module in pairs for name, v in vars(module).items() if isinstance(v, ReadTensor)]
    outside = refs.find([*held, *(("", stand_in.binding) for _, _, stand_in in stand_ins)])
    for module, other in pairs.items():
        for name, tensor in vars(other).get("_former_parameters", {}).items():
            other._parameters[name] = tensor
            vars(other).pop(name, None)
        keep_lists([other] if isinstance(module._parameters, Table) else [])
        refs.copied.update((id(vars(module)[name]), vars(other)[name]) for name in _TABLES)
    for module in outside:  # views of layers, which share their tables
        vars(copies[id(module)]).update({name: refs.led(v) for name, v in vars(module).items() if name != "_parameters"})
        vars(copies[id(module)])["_parameters"] = refs.led(module._parameters)
    for module, other in pairs.items():
        own = vars(module)
        changed = {name: refs.led(v) for name, v in own.items() if name not in _HOOKS and name not in _TABLES and name != _OWN}
        vars(other).update({name: v for name, v in changed.items() if not isinstance(own[name], Tensor)})
        if "forward" not in own:
            vars(other).pop("forward", None)
        vars(other).pop(_OWN, None)
    for module, name, stand_in in stand_ins:
        vars(copies[id(module)])[name] = ReadTensor.of(refs.led(stand_in.binding), stand_in.of_parameter)
    show_lists(replica, [refs.led(binding) for binding in bindings(root).values()])
    for binding in bindings(root).values():
        for each in (binding, *binding.followers):
            _place_constants(each, refs.led(each))


def _pairs(module: nn.Module, replica: nn.Module, seen: dict[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Pair each module of a tree with its replica."""
    if module not in seen:
        seen[module] = replica
        for name, child in module._modules.items():
            if child is not None:
                _pairs(child, replica._modules[name], seen)  # type: ignore[arg-type]
    return seen


def _place_constants(binding: Binding, own: Binding) -> None:
    """Move a target's constants to where its params are; a replica may also be of another dtype."""
    before, now = (next(iter(b.registered().values())) for b in (binding, own))
    own.W.constants = {  # a dict of its own: it holds no layer, so the replica shares the original's until here
        name: c.to(now.device, now.dtype if c.is_floating_point() and now.dtype is not before.dtype else c.dtype)
        for name, c in binding.W.constants.items()
    }
