"""The params of a target as parameters of a module of a copy."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lite.core.tree import modules_by_path
from lora_lite.layers.access import ADAPTERS, HOST
from lora_lite.layers.kind import Params


class Adapter(nn.Module):
    """The params of one target as parameters of a module: a child of the layer that they adapt.

    Called, it is the adapted layer: what wraps modules with trainable parameters of their own (Opacus) finds them here. A module that has
    children may run through them, as `nn.Sequential` does: there the parameters are registered on the module itself, and nothing is added
    to its children.
    """

    names: dict[str, str]
    """The name of each param in `place`."""
    place: Any
    """The module on which the params are registered."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.binding, self.names = path, cast("Any", None), {}  # tensors that targets share are bound to none
        vars(self)["place"] = self  # not a child
        self.alone = False  # a copy that some tool calls by itself, on the layer as it is

    @classmethod
    def on(cls, host: nn.Module, path: str, named: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> "Adapter":
        """Register placeholders for the params of the target at `path` on a module of a copy.

        Names begin with `named` where several adapters meet on one module."""
        self = cls(path)
        leaf = not any(not isinstance(child, Adapter) for child in host._modules.values()) and not isinstance(host, _CONTAINERS)
        if leaf:
            host.add_module(_free_name(host, named), self)
        else:
            vars(self)["place"] = host
            vars(host).setdefault(ADAPTERS, []).append(self)
        for name, shape in shapes.items():
            own = name.replace(".", "/")  # no parameter's name has a dot
            self.names[name] = _free_name(self, own) if leaf else _free_name(host, f"{named}_{own}")
            placeholder = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
            self.place.register_parameter(self.names[name], placeholder)
        return self

    @property
    def parameters_by_name(self) -> dict[str, Tensor | None]:
        """The parameters, by the names that the variant has for them."""
        table = self.place._parameters
        return {name: table.get(own) for name, own in self.names.items()}

    def params(self) -> Params:
        """Return the parameters as params."""
        return {name: self.param(name) for name in self.names}

    def param(self, name: str) -> Tensor:
        """Return one of the parameters, by the variant's name of it."""
        own, table = self.names[name], self.place._parameters
        found: Tensor = table[own] if own in table else getattr(self.place, own)
        return found

    def fill(self, leaves: Mapping[str, Tensor]) -> None:
        """Make copies of a target's params the parameters, to be trained."""
        for name, own in self.names.items():
            self.place.register_parameter(own, nn.Parameter(leaves[name].detach().clone()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.binding.run(args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "_local_tensor") and name in vars(self).get("_parameters", ()) and self.binding is not None:
            self.binding.hide_reads()  # FSDP2 takes the params, and will look for the layers' own
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.binding is not None and not self.alone:
            constants = {name: fn(c) for name, c in self.binding.W.constants.items()}
            for binding in (self.binding, *self.binding.followers):
                binding.W.constants = constants
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        by_itself = self.binding is not None and id(vars(self.binding.W.layer)[HOST]) not in memo
        if by_itself and self.binding.followers:
            raise ValueError(
                f'adapt.module: expected a tool that runs the adapter of "{self.path}" by itself, as Opacus does, to see all that its '
                "params do, found modules with the same weight, such as a tied head, which take them too. Use ll.per_example_grad, or give "
                "the head a weight of its own."
            )
        return self.twin() if by_itself else _deep(self, memo)  # as Opacus copies it: it goes on adapting the same layer

    def twin(self) -> "Adapter":
        """Return an adapter with copies of the parameters, of the same layer."""
        other = Adapter(self.path)
        other.names = dict(self.names)
        for name, p in self._parameters.items():
            other.register_parameter(name, None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad))
        other.binding, other.alone = self.binding.with_adapter(other), True
        return other


Shared = Mapping[str, tuple[Adapter, str]] | tuple[()]
"""Params that a target shares with others, by its own names: the adapter in which they lie, and the name there."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _deep(adapter: Adapter, memo: dict[int, Any]) -> Adapter:
    other = Adapter.__new__(Adapter)
    memo[id(adapter)] = other
    vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(adapter).items()})
    return other


def _free_name(module: nn.Module, name: str) -> str:
    while hasattr(module, name):  # names of ours never meet the user's
        name += "_"
    return name


def adapters(module: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters of a bound copy."""
    for inner in modules_by_path(module).values():
        if isinstance(inner, Adapter):
            yield inner
        yield from vars(inner).get(ADAPTERS, ())


def placeholders(module: nn.Module) -> set[Any]:
    """Return the parameters of a bound copy that are adapters'."""
    return {p for adapter in adapters(module) for p in adapter.parameters_by_name.values() if p is not None}
