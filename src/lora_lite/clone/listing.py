"""The lists of a copy's parameters: a forward that takes its weights from one finds what an attribute shows, and no adapter's params.

`named_parameters`, `parameters` and `state_dict` read the modules' tables. Outside of a forward these are the copy's own tensors, as for
an optimiser. The tables themselves keep the frozen tensors, for the kinds that read them by name.
"""

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.tree import join, modules_by_path
from lora_lite.layers.access import ADAPTERS, HOST, ReadTensor


class Table(dict[str, Any]):
    """A module's table of parameters, which lists the adapted ones inside of a forward.

    Attributes:
        module: whose table it is; None until `show` names it.
        binding: of a target with params or parameters in the table.
    """

    module: nn.Module | None = None
    binding: Any = None

    def items(self) -> Any:
        return self._listed().items() if self._inside() else super().items()

    def values(self) -> Any:
        return self._listed().values() if self._inside() else super().values()

    def show(self, module: nn.Module, binding: Any) -> None:
        """Begin to list adapted parameters."""
        self.module, self.binding = module, binding

    def _inside(self) -> bool:
        binding = self.binding
        if binding is None:
            return False
        if binding.params is not None or binding.off:
            return True
        return not binding.hollow() and (torch.compiler.is_dynamo_compiling() or _by_forward(binding.root))

    def _listed(self) -> dict[str, Any]:
        own: dict[str, Any] = vars(self.module)
        hidden = {name for adapter in (self.module, *own.get(ADAPTERS, ())) for name in getattr(adapter, "names", {}).values()}
        shown = [name for name in self if name not in hidden]
        return {name: _first(own[name]) if name in own else self[name] for name in shown}


def keep_lists(modules: Iterable[nn.Module]) -> None:
    """Put such tables into modules of a copy, before anything else refers to those that they have."""
    for module in modules:
        if not isinstance(module._parameters, Table):
            vars(module)["_parameters"] = Table(module._parameters)


def show_lists(root: nn.Module, bindings: Iterable[Any]) -> None:
    """Let the lists of a bound copy show adapted parameters inside of a forward."""
    for binding in bindings:
        adapters = [binding.adapter, *(adapter for adapter, _ in binding.shared.values())]
        keep_lists(adapters)
        for adapter in adapters:
            _show(adapter, binding)
            _show(adapter.place, binding)
    for module in root.modules():
        found = next((value.binding for value in vars(module).values() if isinstance(value, ReadTensor)), None)
        if found is not None:
            _show(module, found)


def parameters_of(block: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in the tables of a block by name, whoever lists them."""
    tables = ((path, module._parameters) for path, module in modules_by_path(block).items())
    return {join(path, name): p for path, table in tables for name, p in dict.items(table) if p is not None}


def _first(stand_in: Any) -> Any:
    """Return the stand-in of the target whose weight this is: one that is held twice is listed once."""
    leader = getattr(stand_in.binding, "leader", None) if isinstance(stand_in, ReadTensor) else None
    return stand_in if leader is None else vars(vars(leader.W.layer)[HOST]).get("weight", stand_in)


def _show(module: nn.Module, binding: Any) -> None:
    table = vars(module)["_parameters"]
    if isinstance(table, Table) and table.binding is None:
        table.show(module, binding)


def _by_forward(root: nn.Module) -> bool:
    """Whether the forward of a module of a copy asks, rather than a hook, a wrapper around the copy or a tool."""
    codes, frame = set(), sys._getframe(1)
    while frame is not None and frame.f_code not in _CALLS:
        codes.add(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    module: Any = None if frame is None else frame.f_locals.get("self")
    if module is None or type(module).__module__.startswith("torch."):
        return False  # no layer of torch's lists its parameters: such a module is a wrapper
    forward: Any = inspect.unwrap(type(module).forward)
    codes_of = {getattr(f, "__code__", None) for f in (type(module).forward, forward)}
    return bool(codes & codes_of) and any(inner is module for inner in root.modules())


_CALLS = frozenset((nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__))
