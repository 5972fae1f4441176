"""A parameter of a module as a target: a bare `nn.Parameter`, the packed projection of attention, a layer whose weight is only read.

Nobody calls such a weight with an input. The adapted weight is `f(I)`, the variant's function at the identity, `W^T + scale (B A)^T` for
LoRA; while the module around it runs, that tensor stands in the place of the parameter. In a clone the parameter becomes a module of its
own, `Held`, that has the variant's params.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.core.frozen import Frozen, FrozenLinear, Run
from lora_lite.core.subclass import derived


class Held(nn.Module):
    """What stands for a parameter of a module: a weight `(o, i)`, or several of them `(n, o, i)`, `(n, i, o)` where they are transposed."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self) -> Any:
        return self.weight


def layer_of(model: nn.Module, path: str) -> nn.Module:
    """Give the module at a target's path; of a parameter, a `Held` of it."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    weight = module._parameters.get(name)
    if weight is None:
        return model.get_submodule(path)
    return Held(weight, module._parameters.get(f"{name}_bias"), bool(getattr(module, "is_transposed", False)))


def exposed(clone: nn.Module, path: str, reader: Callable[[Any], Any] | None) -> nn.Module:
    """Give the module at a target's path in a clone; a parameter is made one. `reader` makes the class of the module that uses it."""
    parent, _, name = path.rpartition(".")
    layer = layer_of(clone, path)
    if reader is not None:
        module = clone.get_submodule(parent)
        if isinstance(layer, Held) and name in module._parameters:
            del module._parameters[name]
            module.add_module(name, layer)
        module.__class__ = reader(type(module))
    return layer


class FrozenStack(FrozenLinear):
    """The kind of a `Held` with one weight or several: params and constants of several are stacked along a first axis."""

    observed: ClassVar[bool] = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return isinstance(layer, Held)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return True  # whatever its forward does, nobody calls it

    @property
    def stacked(self) -> bool:
        return self._layer.weight.dim() == 3

    @property
    def weight(self) -> Tensor:
        weight = self._layer.weight
        return weight.transpose(-1, -2) if getattr(self._layer, "transposed", False) else weight

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def parts(self) -> Sequence[Frozen]:
        if not self.stacked:
            return (self._part(self.weight, self.bias, self.constants),)
        constants = {name: c.unbind(0) for name, c in self.constants.items()}
        biases = [None] * len(self.weight) if self.bias is None else self.bias.unbind(0)
        weights = self.weight.unbind(0)
        return [self._part(w, b, {name: c[n] for name, c in constants.items()}) for n, (w, b) in enumerate(zip(weights, biases))]

    def _part(self, weight: Tensor, bias: Tensor | None, constants: Mapping[str, Tensor]) -> Frozen:
        return Frozen(weight, bias, constants, self.training)

    def split(self, params: Mapping[str, Tensor]) -> Sequence[Mapping[str, Tensor]]:
        """Give each part's params."""
        if not self.stacked:
            return (params,)
        each = {name: p.unbind(0) for name, p in params.items()}
        return [{name: p[n] for name, p in each.items()} for n in range(len(self.weight))]

    def joined(self, results: Sequence[Tensor]) -> Tensor:
        """Stack what was computed for each part."""
        return torch.stack(tuple(results)) if self.stacked else results[0]

    def to_weight(self, dense: Tensor) -> Tensor:
        return dense.transpose(-1, -2) if getattr(self._layer, "transposed", False) else dense


class _AtIdentity(Frozen):
    """A linear map at the rows of the identity, which are never formed."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.t()

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        return A.t()

    def rows(self, x: Tensor) -> Tensor:
        return torch.empty((self.in_features, self.in_features), dtype=self.dtype, device="meta")


class FrozenHeld(FrozenStack):
    """The kind of a weight that the module around it reads."""

    gives: ClassVar[AbstractSet[str]] = frozenset({"output", "project"})
    has_input: ClassVar[bool] = False
    why: ClassVar[str] = "The module around this weight reads it and never calls it with an input."

    @property
    def bias(self) -> None:
        return None  # the module's own affair

    def _part(self, weight: Tensor, bias: Tensor | None, constants: Mapping[str, Tensor]) -> Frozen:
        return _AtIdentity(weight, None, constants, self.training)

    def over_parts(self, f: Callable[..., Tensor], params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self.joined([f(p, W, x).t() for p, W in zip(self.split(params), self.parts)])

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self.to_weight(run(self, self.weight)).contiguous()  # as the parameter lies: another layout may round otherwise


class Reader:
    """The part of a module's class in a clone that puts adapted weights in place while the module runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _in_place(self):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def reader_class(cls: Any) -> Any:
    """Make the subclass of a class that reads adapted weights; the same one for the same class."""
    if issubclass(cls, Reader):
        return cls
    return derived(reader_class, cls, Reader)


@contextmanager
def _in_place(module: nn.Module) -> Iterator[None]:
    bound = {name: (child, vars(child)["_lora_lite"].W) for name, child in module._modules.items() if "_lora_lite" in vars(child)}
    held: dict[str, Any] = {name: child for name, (child, W) in bound.items() if isinstance(W, FrozenHeld)}
    weights = {name: child() for name, child in held.items()}
    places: list[tuple[Any, str]] = [(module._parameters, n) if isinstance(c, Held) else (c._parameters, "weight") for n, c in held.items()]
    before = [table.get(name) for table, name in places]
    try:
        for (table, name), weight in zip(places, weights.values()):
            table[name] = weight  # found before the module of the same name
        yield
    finally:
        for (table, name), tensor in zip(places, before):
            if tensor is None:
                table.pop(name, None)
            else:
                table[name] = tensor
