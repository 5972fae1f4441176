"""Whole modules, whose own parameters are moved."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.core.errors import NO_ANSWER, listed
from lora_lite.core.frozen import Frozen
from lora_lite.core.invocation import is_cache
from lora_lite.core.tree import modules_by_path
from lora_lite.core.written import written
from lora_lite.layers.access import first_of, named_parameters, place_of
from lora_lite.layers.attention import ATTENTION
from lora_lite.layers.by_member import (
    by_rows,
    joined,
    mapped_beside,
    moved,
    moved_rows,
    require_entries,
    require_unwritten,
    taken,
    tensors_in,
)
from lora_lite.layers.embedding import LOOKUPS
from lora_lite.layers.kind import Kind, Params, Run, Variant, of_rows
from lora_lite.layers.member_cache import MemberCaches, caches_in, require_no_cache
from lora_lite.layers.recorder import Recorder
from lora_lite.layers.replaced import Functions, replaced

Own = Callable[..., Any]


class ModuleKind(Kind):
    """Any module that has parameters: a head, an embedding, an encoder. `W(x)` is the module's own output."""

    site: ClassVar[str] = "module"
    gives: ClassVar[AbstractSet[str]] = Frozen.gives - {"positions"} | {"moved"}
    state: ClassVar[Mapping[str, str]] = {}
    why: ClassVar[str] = "A module that is trained as a whole is no linear map."

    def __init__(self, layer: Any, constants: Params | None = None, own: Own | None = None) -> None:
        super().__init__(layer, constants)
        self._own = own or layer
        self._now: Mapping[str, Tensor] | None = None
        self._unmapped = False
        self._rest: tuple[Any, ...] = ()  # of the call that runs: the module's own forward, the other arguments by place and by name

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return any(p.is_floating_point() for p in layer.parameters())

    @classmethod
    def places(cls, path: str, module: nn.Module, linear: Callable[[nn.Module], Any]) -> Iterator[str]:
        if path and cls.fits(module):
            yield path

    @classmethod
    def holders(cls, path: str, shared: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        inside = f"{path}."
        others = [other for own, paths in shared.items() if own == path or own.startswith(inside) for other in paths]
        return tuple(other for other in dict.fromkeys(others) if other != path and not other.startswith(inside))

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {name: p for name, p in named_parameters(self.layer) if p.is_floating_point()}

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
        with self.swapped({}):
            return self._own(x)

    def call(self, run: Run, own: Own, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        rest = dict(kwargs) if args else dict(list(kwargs.items())[1:])
        first = (first_of(args, kwargs),) if args or kwargs else ()
        before = self._own, self._rest
        self._rest = own, args[1:], rest
        self._own = lambda x: own(x, *args[1:], **rest)
        try:
            return run(self, *first)
        finally:
            self._own, self._rest = before

    def beside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        return tensors_in((args[1:], dict(kwargs) if args else dict(list(kwargs.items())[1:])))

    def results(self, y: Any) -> dict[str, Tensor]:
        return {} if self._recurrent else tensors_in(y)  # a recurrent module is refused as such

    def moved(self, deltas: Mapping[str, Tensor]) -> Callable[[Any], Any]:
        now = {name: (p + deltas[name]).to(p.dtype) for name, p in self.parameters.items() if name in deltas}

        def run(x: Any) -> Any:
            with self.swapped(now):
                return self._own(x)

        return run

    @contextmanager
    def swapped(self, now: Mapping[str, Tensor]) -> Iterator[None]:
        """Swap tensors in for the module's parameters during a call. The module is of a copy, whose calls run one at a time."""
        tables = list(_places(self.layer, now))
        tensors = [table[own] for table, own, _ in tables]
        before, self._now = self._now, now
        try:
            for table, own, name in tables:
                table[own] = now[name]
            yield
        finally:
            self._now = before
            for (table, own, _), tensor in zip(tables, tensors):
                table[own] = tensor

    @property
    def moving(self) -> bool:
        return self._now is not None

    def moved_in(self, part: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that stand in the place of parameters of a part of the module in the call that runs, by name."""
        there = {id(p) for inner in part.modules() for p in dict.values(inner._parameters)}
        return {name: tensor for name, tensor in (self._now or {}).items() if id(tensor) in there}

    def apply_rows_at(self, axis: int, f: Variant, params: Params, x: Tensor, index: Tensor | None) -> Any:
        """Let the module itself see its rows where it expects them: to it another axis is no row, but time."""
        (own, args, kwargs), before = self._rest, (self._own, self._rest)
        own = moved_rows(own, axis)
        self._own, self._rest = lambda x: own(x, *args, **kwargs), (own, args, kwargs)
        try:
            return moved(self.apply_rows(f, params, x.movedim(axis, 0), index), 0, axis)
        finally:
            self._own, self._rest = before

    def apply_rows(self, f: Variant, params: Params, x: Any, index: Tensor | None) -> Any:
        """Apply a variant to each row with the params of its member. What is called with more than its input runs member by member."""
        rows = len(next(iter(params.values())) if index is None else index)
        if rows == 1:  # all that the module is called with is of one member
            return self.apply(f, {name: p[0] for name, p in of_rows(params, index)[0].items()}, x)
        others = tensors_in(self._rest[1:])
        if self.follow is None:  # nobody has seen which of them grow with the batch: a first axis of one holds no rows
            lost = [name for name, value in others.items() if value.dim() and value.shape[0] != 1]
        else:
            lost = [name for name in others if name not in self.follow]
        if lost:
            raise ValueError(
                f"expected arguments whose rows can be told from what rows share, found that {listed(lost)} cannot. Train a part of it "
                "that is called with one tensor, or run the members one by one."
            )
        spread = {name for name, value in others.items() if self.follow and self._has_rows(value, self.follow[name])}
        if spread and not torch.compiler.is_compiling():
            return self._by_member(f, params, x, index, spread)
        if self._recurrent:
            raise ValueError(
                "expected modules that torch can map over members, found a recurrent one, whose kernels it cannot. Train other parts, or "
                "run the members one by one."
            )
        if spread:
            require_no_cache(self._rest[1:])
            one = functools.partial(self._with, replaced(f, self._functions))
            return mapped_beside(one, *of_rows(params, index), x, self._rest[1:], spread)
        found = self._mapped(f, params, x, index)
        if rows > 1 and self.follow is None and not torch.compiler.is_compiling():  # no trial has shown that these are rows
            require_entries(found, len(x))
        group = (self.count or rows) // rows if self.follow is not None else 1  # rows of a member that have come together
        return pytree.tree_map_only(Tensor, lambda y: y.repeat_interleave(group, 0) if len(y) == rows else y, found) if group > 1 else found

    def _mapped(self, f: Variant, params: Params, x: Any, index: Tensor | None) -> Any:
        """Map the module over rows. One that torch cannot map, since it looks at values or sets `.data`, runs member by member.

        So does one with a key-value cache: a map would leave its own tensors there.
        """
        if not (self._unmapped or caches_in(self._rest[1:])):
            try:
                found = super().apply_rows(replaced(f, self._functions), params, x, index)
                if not caches_in(found):
                    return found
            except RuntimeError as e:
                if torch.compiler.is_compiling() or not self.layer._modules or isinstance(e, NO_ANSWER):
                    raise
        found = self._by_member(f, params, x, index, set())
        self._unmapped = not caches_in(self._rest[1:])  # torch's error was of the map: the module itself raises none
        return found

    def _with(self, f: Variant, params: Params, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Apply a variant where the module is called with these arguments beside its input."""
        before, self._own = self._own, lambda x: self._rest[0](x, *args, **kwargs)
        try:
            return self.apply(f, params, x)
        finally:
            self._own = before

    def _has_rows(self, value: Tensor, shared: int) -> bool:
        """Whether a tensor beside the input has the rows: of its own, or since a module before has made each row's of what all shared."""
        return not shared or (value.dim() > 0 and bool(self.count) and len(value) == shared * (self.count or 0))

    @property  # a cached one has a lock, which the compiler does not enter
    def _recurrent(self) -> bool:
        """Whether the module is or holds a recurrent one."""
        return any(isinstance(inner, nn.RNNBase) for inner in self.layer.modules())

    @property
    def _functions(self) -> Functions:
        """Torch's functions that cannot be mapped over members as they are, as for a table with a padded row."""
        padded = any(getattr(inner, "padding_idx", None) is not None for inner in self.layer.modules())
        return {**(LOOKUPS if padded else {}), **(ATTENTION if self.layer._modules else {})}

    def _by_member(self, f: Variant, params: Params, x: Tensor, index: Tensor | None, spread: set[str]) -> Any:
        """Run the module once for each member, on its rows. Members share no parameter of it, so that one call would save nothing."""
        members = next(iter(params.values())).shape[0]
        each = (self.count or members) // members
        member = torch.arange(members, device=x.device).repeat_interleave(each) if index is None else index
        _, args, kwargs = self._rest
        outputs, order, caches = [], [], MemberCaches(len(x), member)
        if torch.compiler.is_compiling():
            require_no_cache((args, kwargs))
        for k in range(members):
            rows = (member == k).nonzero().flatten()
            if not len(rows) and (k or len(member)):
                continue

            def of_member(path: Any, value: Any, rows: Tensor = rows) -> Any:
                if is_cache(value):
                    return caches.of_rows(value, rows)
                return taken(value, rows, len(member)) if pytree.keystr(path) in spread else value

            its, named = pytree.tree_map_with_path(of_member, (args, kwargs), is_leaf=is_cache)
            given = taken(x, rows, len(member))
            wrote = written({"its input": given, **{name: t for name, t in tensors_in((its, named)).items() if name in spread}})
            found = self._with(f, {name: p[k] for name, p in params.items()}, given, its, named)
            require_unwritten(wrote())
            outputs.append(pytree.tree_map(functools.partial(by_rows, count=len(rows)), found, is_leaf=is_cache))
            order.append(rows)
        back = torch.cat(order).argsort()
        caches.join(order)

        def together(*parts: Any) -> Any:
            return caches.joined(parts, order) if is_cache(parts[0]) else joined(parts, back)

        return pytree.tree_map(together, *outputs, is_leaf=is_cache)

    def merged(self, f: Variant, params: Params) -> dict[str, Tensor]:
        """Run the variant on a recorder of displacements. A variant that does more than displace parameters has no merged weights."""
        deltas = self.displacements(f, params)
        return {name: p + deltas[name] if name in deltas else p for name, p in self.parameters.items()}

    def displacements(self, f: Variant, params: Params) -> Mapping[str, Tensor]:
        W, x = Recorder(self), self.weight.new_zeros(1, self.in_features)
        y = f.forward(params, W, x)
        if W.deltas is None or not W.alone(x, y):
            raise ValueError("the adapter does more than move the module's parameters, which is all that a state dict can hold")
        return W.deltas

    def kept(self) -> dict[str, Tensor]:
        return dict(self.parameters)

    def read(self, f: Variant, params: Params, name: str) -> Tensor:
        if self._now is not None:
            return self._now[name] if name in self._now else self.parameters[name]
        p = self.parameters[name]
        deltas = self.displacements(f, params)
        return (p + deltas[name]).to(p.dtype) if name in deltas else p

    def readable(self) -> list[str]:
        return list(self.parameters)

    def changes(self, f: Variant, params: Params) -> list[tuple[Tensor, Tensor]]:
        raise ValueError("trains a module as a whole, biases and all, which LoRA cannot hold")

    def probe(self, tokens: int) -> list[Any]:
        return []  # the module itself runs


def _places(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[Any, str, str]]:
    """Yield the tables of modules inside that hold parameters, with the key there and the name: several for one that modules share."""
    hosts = {name: place_of(module, name) for name in names}
    named = {host._parameters[own]: name for name, (host, own) in hosts.items()}
    for inner in modules_by_path(module).values() if named else ():
        yield from ((inner._parameters, own, named[p]) for own, p in dict.items(inner._parameters) if p in named)
