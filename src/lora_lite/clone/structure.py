"""The structural clone: the module tree copied, every parameter and buffer aliased, the user's model untouched.

Tensors keep their storage and lose their autograd state. Containers are the clone's own, so that a forward that writes into one does not
write into the user's. References to modules of the tree lead to the clone, however deep they lie. Other objects that a module holds are
shared, hooks among them, since they may hold locks that cannot be copied.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lora_lite.clone.accelerate import carry, moves_inputs, runs_class_forward
from lora_lite.clone.offloaded import Offloaded
from lora_lite.clone.references import PLAIN, References, containers_in, slots_of
from lora_lite.clone.settings import note_sizes
from lora_lite.core.errors import listed, several
from lora_lite.core.tree import join, modules_by_path
from lora_lite.layers.access import ADOPTED
from lora_lite.layers.find import adopt, faults
from lora_lite.layers.kind import Kind

_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if hasattr(value, "copy"))  # hooks, and what nn.Module notes
_HOOKS = frozenset(name for name in _TABLES if name.endswith("_hooks"))


def clone_module(model: nn.Module, kinds: Sequence[type[Kind]] = ()) -> nn.Module:
    """Copy a module tree without copying a weight. Quantised layers, target or not, run their kind instead of their own forward.

    Args:
        model: any module.
        kinds: kinds besides those that ship.

    Raises:
        ValueError: for modules whose forward cannot be led to the copy (scripted, compiled or patched by a hook library), and
            quantised layers that hold no quantised weight.
    """
    refuse_uncopied(model)
    unreadable = faults(model, kinds)
    if unreadable:
        raise ValueError(f"build: expected quantised layers that hold their weight quantised, found:\n{several(unreadable)}")
    clone = clone_again(model, kinds)
    note_sizes(clone)
    return clone


def clone_again(clone: nn.Module, kinds: Sequence[type[Kind]] = (), prepared: Callable[[nn.Module], None] = lambda copy: None) -> nn.Module:
    """Copy a private copy, for which the checks of `clone_module` hold already. `prepared` sees the copy before any kind does."""
    copies = _copied(clone)
    prepared(copies[id(clone)])
    adopt(copies.values(), kinds)
    _keep_slow_path(copies.values())
    return copies[id(clone)]


def refuse_uncopied(model: nn.Module) -> None:
    """Refuse a model of which no copy runs: of modules that cannot be looked into, or whose forward is not that of their class.

    Raises:
        ValueError: with the way out.
    """
    named = modules_by_path(model)
    refuse_opaque(named)
    _refuse_patched(named)


def refuse_opaque(named: Mapping[str, nn.Module]) -> None:
    """Refuse modules by path whose parts cannot be looked at: scripted ones, and parameters that have no shape yet.

    Raises:
        ValueError: with the way out.
    """
    scripted = [path or "the model" for path, m in named.items() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise ValueError(
            f"build: expected ordinary modules, found TorchScript at {listed(scripted)}. Build on the model before scripting it."
        )
    lazy = [join(path, name) for path, m in named.items() for name, p in m._parameters.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(f"build: expected parameters with shapes, found lazy ones at {listed(lazy)}. Run the model on one batch first.")


def _refuse_patched(named: Mapping[str, nn.Module]) -> None:
    patched = [path or "the model" for path, m in named.items() if _patched(m)]
    if patched:
        raise ValueError(
            f"build: expected modules that run the forward of their class, found one set on the instance at {listed(patched)}. "
            "Take it off first: accelerate.hooks.remove_hook_from_module(model, recurse=True), or for torch.compile pass the module "
            "inside, compiled._orig_mod, and compile the function that calls adapt."
        )


def _patched(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    if forward is None or ADOPTED in vars(module) or moves_inputs(module):
        return False
    return not (isinstance(forward, types.MethodType) and forward.__self__ is module)


def _alias(tensor: Tensor, tensors: dict[int, Tensor], refs: References) -> Tensor:
    """Share a tensor's storage, not its autograd state. A tensor in two places stays one tensor."""
    if isinstance(tensor, Offloaded):
        return tensor
    if id(tensor) not in tensors:
        alias = _outside_inference(tensor) if tensor.is_inference() else tensor.detach()
        tensors[id(tensor)] = parameter = _parameter(tensor, alias) if isinstance(tensor, nn.Parameter) else alias
        if parameter is not alias:
            vars(parameter).update({name: refs.led(value) for name, value in vars(tensor).items()})
    return tensors[id(tensor)]


@torch.inference_mode(False)
def _outside_inference(tensor: Tensor) -> Tensor:
    """Share the storage of a tensor that was made in inference mode, for whose like autograd keeps nothing."""
    data = tensor.detach()
    if type(data.data) is not Tensor or data.layout is not torch.strided or data.is_conj() or data.is_neg() or data.is_quantized:
        return data
    return torch.empty(0, dtype=data.dtype, device=data.device).set_(
        data.untyped_storage(), data.storage_offset(), data.shape, data.stride()
    )


def _parameter(tensor: nn.Parameter, alias: Tensor) -> nn.Parameter:
    """Make `alias` a parameter of the class of `tensor`, as that of a quantised weight."""
    cls = type(tensor)
    if issubclass(cls, nn.Parameter):
        return torch.Tensor._make_subclass(cls, alias, False)
    return nn.Parameter(alias, requires_grad=False)  # a tensor class with data of its own, only marked as a parameter


def _copied(root: nn.Module) -> dict[int, nn.Module]:
    """Copy all modules of a tree. The result maps the `id` of an original to its copy."""
    named = modules_by_path(root)
    copies: dict[int, nn.Module] = {id(module): module.__class__.__new__(module.__class__) for module in named.values()}
    tensors: dict[int, Tensor] = {}
    refs = References(copies, lambda tensor: _alias(tensor, tensors, refs))
    # Each module is gone through once before any is filled: a handle of a hook holds the table that the hook is in.
    tables, rest = _begun(named.items(), copies, refs)
    held = [(join(path, name), value) for path, _, name, value in rest]
    held += [(join(path, place), value) for path, _, name, table in tables for place, value in _of_table(name, table)]
    outside = refs.find(held, [c for _, _, _, value in rest for c in containers_in(value)])
    more, others = _begun((("", module) for module in outside), copies, refs)
    for _, state, name, table in tables + more:
        state[name].update({k: refs.led(v) for k, v in table.items()} if isinstance(table, Mapping) else table)
    for _, state, name, value in rest + others:
        state[name] = refs.led(value)
    for module in (*named.values(), *outside):
        _settle(copies[id(module)], module)
    return copies


_Found = list[tuple[str, dict[str, Any], str, Any]]


def _begun(named: Iterable[tuple[str, nn.Module]], copies: Mapping[int, nn.Module], refs: References) -> tuple[_Found, _Found]:
    """Begin each copy with its tables, empty, and its plain values.

    Returns:
        What remains of each module, as `(path, the copy's attributes, name, value)`: tables that are not empty, and other attributes.
    """
    full, rest = _Found(), _Found()
    for path, module in named:
        state, adopted = vars(copies[id(module)]), ADOPTED in vars(module)
        for name, value in (vars(module) | slots_of(module)).items():
            if type(value) in PLAIN:
                state[name] = value
            elif name in _TABLES:
                state[name] = refs.copied[id(value)] = type(value)()
                if value:
                    full.append((path, state, name, value))
            elif name != "_compiled_call_impl" and not (adopted and name in _MADE_ANEW):
                rest.append((path, state, name, value))
    return full, rest


_MADE_ANEW = ("forward", "_apply")
"""The attributes that a kind puts into a layer of a private copy, as it will into the copy's own."""


def _of_table(name: str, table: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a table that may lead to a module: hooks, and attributes that libraries keep on parameters."""
    if name in _HOOKS:
        yield from ((name, hook) for hook in table.values())
    elif name == "_parameters":
        yield from ((f"{k}.{own}", v) for k, p in table.items() if p is not None for own, v in vars(p).items())


def _settle(copy: nn.Module, module: nn.Module) -> None:
    state = vars(copy)
    for name in slots_of(module):
        object.__setattr__(copy, name, state.pop(name))
    state["_compiled_call_impl"] = None  # model.compile() leaves the user's own compiled call here
    if "forward" not in vars(module):
        return
    if moves_inputs(module):
        carry(copy)
    elif runs_class_forward(module):
        state.pop("forward", None)  # set on the instance it would hide that of the class which a target takes


def _keep_slow_path(modules: Iterable[nn.Module]) -> None:
    """Keep torch's fused encoder path off: it reads the layers' weights without calling them."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
