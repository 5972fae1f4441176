"""Kinds of targets beyond linear layers: whole modules, whose own parameters are moved, and blocks, whose output is edited."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lora_lite.core.errors import listed
from lora_lite.core.frozen import PARAM, FrozenLinear, Run, first_of
from lora_lite.layers.kinds import kind_of
from lora_lite.layers.prompt import PROMPT, edited

Own = Callable[..., Any]
Kinds = Sequence[type[FrozenLinear]]


class FrozenModule(FrozenLinear):
    """The kind of any module that has parameters: a norm, a head, an embedding. `W(x)` is the module's own output."""

    def __init__(self, layer: Any, constant_names: Mapping[str, str] = MappingProxyType({}), own: Own | None = None) -> None:
        super().__init__(layer, constant_names)
        self._own = own or layer
        self.alone = True
        """Whether one tensor is all that the module is called with."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        named = self._layer.named_parameters()
        return {name: p for name, p in named if p.is_floating_point() and not name.rpartition(".")[2].startswith(PARAM)}

    @property
    def weight(self) -> Tensor:
        return next(iter(self.parameters.values()))

    @property
    def bias(self) -> None:
        return None

    @property
    def in_features(self) -> int:
        """The last axis of the module's first parameter."""
        return self.weight.shape[-1] if self.weight.dim() else 1

    @property
    def out_features(self) -> int:
        """The first axis of the module's first parameter."""
        return self.weight.shape[0] if self.weight.dim() else 1

    def __call__(self, x: Tensor) -> Any:
        return self._own(x)

    def call(self, run: Run, own: Own, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        rest = dict(kwargs) if args else dict(list(kwargs.items())[1:])
        first = (first_of(args, kwargs),) if args or kwargs else ()
        W = type(self)(self._layer, self.constant_names, lambda x: own(x, *args[1:], **rest))
        W.alone = not any(isinstance(value, Tensor) for value in (*args[1:], *rest.values()))
        return run(W, *first)

    def moved(self, deltas: Mapping[str, Tensor]) -> Callable[[Any], Any]:
        now = {name: (p + deltas[name]).to(p.dtype) for name, p in self.parameters.items() if name in deltas}

        def run(x: Any) -> Any:
            with _swapped(self._layer, now):
                return self._own(x)

        return run


class FrozenBlock(FrozenModule):
    """The kind of a block whose output, hidden states `(b, t, d)`, a variant edits. `W(x) = x`: what there is to edit is the input."""

    def __init__(self, layer: Any, constant_names: Mapping[str, str] = MappingProxyType({}), width: int = 0) -> None:
        super().__init__(layer, constant_names)
        self.width = width or width_of_block(layer)

    @property
    def in_features(self) -> int:
        """Width of the hidden states, `d`."""
        return self.width

    @property
    def out_features(self) -> int:
        """Width of the hidden states, `d`."""
        return self.width

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def call(self, run: Run, own: Own, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = own(*args, **kwargs)
        h = out if isinstance(out, Tensor) else out[0]
        if not isinstance(h, Tensor) or h.dim() != 3 or h.shape[-1] != self.width:
            found = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"adapt: expected a block to give hidden states (b, t, {self.width}), found {found}. Name blocks that do.")
        new = edited(lambda z: run(self, z), h, self._layer._buffers[PROMPT], self._layer._lora_lite.cfg.ends)
        return new if isinstance(out, Tensor) else (new, *out[1:])


def width_of_block(layer: nn.Module) -> int:
    """Give the width of the hidden states that a block passes on: that of its outermost norm, else of its first linear layer's input."""
    norms = [(name.count("."), module) for name, module in layer.named_modules() if is_norm(module)]
    if norms:  # the deeper ones may be of single attention heads
        return min(norms, key=lambda found: found[0])[1].weight.shape[-1]
    linear = next((kind(module) for module in layer.modules() if (kind := kind_of(module)) is not None), None)
    if linear is None:
        raise ValueError("find_targets: expected blocks with a norm or a linear layer, found one with neither. Name other blocks.")
    return linear.in_features


def is_norm(layer: nn.Module) -> bool:
    """Tell whether a module is a norm with a trainable weight: by its class's name, since each model family has classes of its own."""
    return "norm" in type(layer).__name__.lower() and getattr(layer, "weight", None) is not None and not list(layer.children())


def candidates(model: nn.Module, adapts: str, kinds: Kinds = ()) -> dict[str, type[FrozenLinear]]:
    """Find what a variant can adapt, by path: the kind of each module of the sort that `adapts` names."""
    return _FINDERS[adapts](model, kinds)


def kind_at(layer: nn.Module, adapts: str, kinds: Kinds = ()) -> type[FrozenLinear] | None:
    """Find the kind of one module for a variant, or None where it is of another sort."""
    if adapts == "linear":
        return kind_of(layer, kinds)
    if adapts == "norm":
        return FrozenModule if is_norm(layer) else None
    return FrozenBlock if adapts == "block" else FrozenModule


def _linear(model: nn.Module, kinds: Kinds) -> dict[str, type[FrozenLinear]]:
    return {path: kind for path, layer in model.named_modules() if (kind := kind_of(layer, kinds)) is not None}


def _norms(model: nn.Module, kinds: Kinds) -> dict[str, type[FrozenLinear]]:
    return {path: FrozenModule for path, layer in model.named_modules() if is_norm(layer)}


def _modules(model: nn.Module, kinds: Kinds) -> dict[str, type[FrozenLinear]]:
    return {path: FrozenModule for path, layer in model.named_modules() if path and any(p.is_floating_point() for p in layer.parameters())}


def _blocks(model: nn.Module, kinds: Kinds) -> dict[str, type[FrozenLinear]]:
    """The repeated blocks: outermost members of module lists that hold linear layers."""
    found: dict[str, type[FrozenLinear]] = {}
    for path, layer in model.named_modules():
        parent = path.rpartition(".")[0]
        listed_in = isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential) if path and parent else False
        inside = any(path.startswith(f"{other}.") for other in found)
        if listed_in and not inside and kind_of(layer, kinds) is None and any(kind_of(m, kinds) for m in layer.modules()):
            found[path] = FrozenBlock
    return found


_FINDERS: dict[str, Callable[[nn.Module, Kinds], dict[str, type[FrozenLinear]]]] = {
    "linear": _linear,
    "norm": _norms,
    "module": _modules,
    "block": _blocks,
}
ADAPTS = tuple(_FINDERS)
"""The sorts of modules that a variant may adapt."""
WORDS = {"linear": "linear layer", "norm": "norm", "module": "module", "block": "block"}
LONGER = {
    "linear": "nn.Linear or Conv1D layers",
    "norm": "norms with a weight",
    "module": "modules with parameters",
    "block": "blocks of a module list that hold linear layers",
}
"""The sorts in the words of messages."""


def outermost(paths: list[str]) -> list[str]:
    """Leave out the paths of modules inside others of the list."""
    known = set(paths)
    return [path for path in paths if not any(path[:k] in known for k, letter in enumerate(path) if letter == ".")]


def refuse_nested(paths: Mapping[str, type[FrozenLinear]]) -> None:
    """Refuse targets inside a module that is trained as a whole.

    Raises:
        ValueError: it names them.
    """
    whole = [path for path, kind in paths.items() if issubclass(kind, FrozenModule) and not issubclass(kind, FrozenBlock)]
    nested = [path for path in paths for other in whole if path.startswith(f"{other}.")]
    if nested:
        raise ValueError(
            f"build: expected no target inside a module that is trained as a whole, found {listed(nested)}. Leave them out with "
            "exclude_names, or train less than the whole module."
        )


@contextmanager
def _swapped(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of a module's parameters; of the clone's, whose calls are one at a time."""
    places: list[tuple[Any, str]] = [
        (layer.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in tensors
    ]
    before = [table[name] for table, name in places]
    try:
        for (table, name), tensor in zip(places, tensors.values()):
            table[name] = tensor
        yield
    finally:
        for (table, name), tensor in zip(places, before):
            table[name] = tensor
