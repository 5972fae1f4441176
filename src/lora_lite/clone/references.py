"""References inside a model, led to its copy.

A module may reach another one by more than an attribute: a list in a list, a partial, a bound method, a lambda that closes over it, a plain
Python object. A reference left behind would run the user's own layer, without the adapter and without an error. So every object between a
module and a layer of the tree is copied, and nothing else: tensors, locks, files and whatever holds no layer stay shared.
"""

import enum
import functools
import gc
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
"""The containers in which a model may keep what it changes."""
PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_LEAVES = (Tensor, type, types.ModuleType, types.CodeType, enum.Enum)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_LRU = type(functools.lru_cache(_LEAVES.__len__))
_WEAK = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_HEAP = 1 << 9  # the flag of classes that Python code defines


class References:
    """The objects through which some modules are reached, and their copies.

    Args:
        copies: the copies of the modules, by the `id` of the original. Modules outside of the tree that hold one of its modules are added.
        alias: returns what stands for a tensor in a copied object.
    """

    def __init__(self, copies: dict[int, nn.Module], alias: Callable[[Tensor], Any]) -> None:
        self._copies, self._alias = copies, alias
        self.copied: dict[int, Any] = {}
        """The copies of objects by the `id` of the original."""
        self._where: dict[int, str] = {}
        self._objects: dict[int, Any] = {}  # held, so that an `id` stays theirs
        self._holders: dict[int, list[int]] = {}
        self._reaching: set[int] = set()

    def find(self, held: Iterable[tuple[str, Any]], own: Iterable[Any] = ()) -> list[nn.Module]:
        """Find the objects that lead to a module of the tree.

        Args:
            held: names and values, of all that the modules hold.
            own: containers that the copy needs for itself, whatever they hold.

        Returns:
            Modules outside of the tree that hold one of its modules, which need a copy too.
        """
        own = list(own)
        reached = self._walk([*(("", value) for value in own), *held])
        self._reaching = self._above(reached, lambda value: True)
        # An object that shares a container with a module and holds no layer stays as it is; a closure over one follows.
        self._reaching |= self._above([id(value) for value in own], _rebuilt)
        found = [self._objects[key] for key in self._reaching]
        outside = [value for value in found if type(value) not in _PROXIES and isinstance(value, nn.Module)]
        self._copies.update((id(module), module.__class__.__new__(module.__class__)) for module in outside)
        return outside

    def _walk(self, held: list[tuple[str, Any]]) -> set[int]:
        """Visit all that is held, and note who holds it; return the modules of the tree that were met."""
        met: set[int] = set()
        todo = [(name, value) for name, value in held if type(value) not in PLAIN]  # from the end: the names come last
        while todo:
            name, value = todo.pop()
            key = id(value)
            if key in self._where or key in self._copies:
                continue
            self._where[key], self._objects[key] = name, value
            for part in _parts(value):
                if type(part) in PLAIN:
                    continue
                self._holders.setdefault(id(part), []).append(key)
                if id(part) in self._copies:
                    met.add(id(part))
                else:
                    todo.append((name, part))
        return met

    def _above(self, start: Iterable[int], through: Callable[[Any], bool]) -> set[int]:
        found: set[int] = {key for key in start if key in self._objects}
        todo = list(start)
        while todo:
            for holder in self._holders.get(todo.pop(), ()):
                if holder not in found and through(self._objects[holder]):
                    found.add(holder)
                    todo.append(holder)
        return found

    def led(self, value: Any) -> Any:
        """Return the counterpart of a value in the copy: the value itself where it holds nothing of the tree."""
        key = id(value)
        if type(value) in PLAIN:
            return value
        if key in self._copies:
            return self._copies[key]
        if key in self.copied:
            return self.copied[key]
        if isinstance(value, Tensor):
            return self._alias(value)
        if key not in self._reaching:
            return value
        new = self._copy(value, key)
        return self.copied.setdefault(key, new)

    def _copy(self, value: Any, key: int) -> Any:
        """Copy an object; one that may hold itself is noted before what it holds is led."""
        led, cls = self.led, type(value)
        if isinstance(value, tuple | frozenset):
            parts = [led(v) for v in value]
            return tuple.__new__(cls, parts) if isinstance(value, tuple) else cls(parts)
        if isinstance(value, types.MethodType):
            return types.MethodType(led(value.__func__), led(value.__self__))
        if isinstance(value, types.BuiltinMethodType):
            return getattr(led(value.__self__), value.__name__)
        if isinstance(value, types.FunctionType):
            return self._function(value, key)
        if isinstance(value, types.CellType):
            cell = self.copied[key] = types.CellType()
            cell.cell_contents = led(value.cell_contents)
            return cell
        if isinstance(value, functools.partial):
            new = self.copied[key] = cls(_later)
            new.__setstate__((led(value.func), tuple(led(a) for a in value.args), {n: led(v) for n, v in value.keywords.items()}, None))
            vars(new).update({n: led(v) for n, v in vars(value).items()})
            return new
        if cls in _PROXIES:
            return weakref.proxy(led(_referent(value)))
        if isinstance(value, weakref.ref):
            return cls(led(value()), value.__callback__) if cls is weakref.ref else self._refuse(value)
        if cls is _LRU:
            return functools.lru_cache(**value.cache_parameters())(led(value.__wrapped__))
        if isinstance(value, weakref.WeakSet):
            return cls(led(v) for v in list(value))
        if isinstance(value, _WEAK):
            return cls({led(k): led(v) for k, v in value.items()})  # type: ignore[union-attr]
        if isinstance(value, list | set | dict | deque):
            return self._container(value, key)
        return self._object(value, key)

    def _function(self, value: types.FunctionType, key: int) -> types.FunctionType:
        cells = value.__closure__ or ()
        held = [c for c in cells if id(c) in self._reaching and id(c) not in self.copied]
        self.copied.update((id(c), types.CellType()) for c in held)
        closure = tuple(self.copied.get(id(c), c) for c in cells) or None
        new = self.copied[key] = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure)
        for cell in held:
            self.copied[id(cell)].cell_contents = self.led(cell.cell_contents)
        new.__defaults__, new.__kwdefaults__ = self.led(value.__defaults__), self.led(value.__kwdefaults__)
        new.__qualname__, new.__module__, new.__doc__ = value.__qualname__, value.__module__, value.__doc__
        new.__annotations__ = value.__annotations__
        vars(new).update({n: self.led(v) for n, v in vars(value).items()})
        return new

    def _container(self, value: Any, key: int) -> Any:
        new = self.copied[key] = self._empty(value)
        if isinstance(value, dict):
            for k, v in value.items():
                dict.__setitem__(new, self.led(k), self.led(v)) if type(value) is dict else new.__setitem__(self.led(k), self.led(v))
        elif isinstance(value, set):
            new.update(self.led(v) for v in value)
        else:
            new.extend(self.led(v) for v in value)
        if hasattr(value, "__dict__"):
            vars(new).update({n: self.led(v) for n, v in vars(value).items()})
        return new

    def _empty(self, value: Any) -> Any:
        if isinstance(value, defaultdict):
            return type(value)(self.led(value.default_factory))
        if isinstance(value, deque):
            return type(value)(maxlen=value.maxlen)
        return value.__class__.__new__(value.__class__)

    def _object(self, value: Any, key: int) -> Any:
        cls: Any = type(value)
        if any(c is not object and not c.__flags__ & _HEAP for c in cls.__mro__) or not (hasattr(value, "__dict__") or _slots(cls)):
            return self._refuse(value)
        try:
            new = self.copied[key] = value.__class__.__new__(value.__class__)
        except TypeError:
            return self._refuse(value)
        if hasattr(value, "__dict__"):
            vars(new).update({n: self.led(v) for n, v in vars(value).items()})
        for name, held in slots_of(value).items():
            object.__setattr__(new, name, self.led(held))
        return new

    def _refuse(self, value: Any) -> Any:
        raise ValueError(
            f'build: cannot copy "{self._where[id(value)]}": it leads to a layer of the model through a {type(value).__name__}. '
            "Keep the layer as an attribute of the module, or in a list, a dict, a partial or a plain Python object."
        )


def containers_in(value: Any) -> Iterator[Any]:
    """Yield the containers that a module holds in an attribute: the attribute's own and those in it, each once."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if type(value) not in (*CONTAINERS, tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is not tuple:
            yield value
        todo.extend(value.values() if isinstance(value, dict) else value)


def _parts(value: Any) -> Iterable[Any]:
    """Return the objects that an object holds."""
    cls: Any = type(value)
    if cls in _PROXIES:
        return (_referent(value),)
    if isinstance(value, _LEAVES):
        return ()
    if isinstance(value, types.FunctionType):
        return (*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, *vars(value).values())
    if isinstance(value, types.CellType):
        return _contents(value)
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, types.BuiltinMethodType):
        return (value.__self__,)
    if cls is _LRU:
        return (value.__wrapped__,)
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, _WEAK):
        return list(value) if isinstance(value, weakref.WeakSet) else [*value.keys(), *value.values()]
    parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        return [*parts, *value.keys(), *value.values(), getattr(value, "default_factory", None)]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [*parts, *value]
    if isinstance(value, functools.partial):
        return [*parts, value.func, *value.args, *value.keywords.values()]
    names = _slots(cls)
    parts += slots_of(value).values()
    return parts if parts or names or not gc.is_tracked(value) else [p for p in gc.get_referents(value) if not isinstance(p, type)]


def slots_of(value: Any) -> dict[str, Any]:
    """Return the values in the slots of an object's class, which are outside of its `__dict__`."""
    cls: Any = type(value)
    return {name: getattr(value, name) for name in _slots(cls) if hasattr(value, name)}


@functools.lru_cache(1024)  # every build asks of every module
def _slots(cls: Any) -> list[str]:
    own = [(c.__name__.lstrip("_"), vars(c).get("__slots__", ())) for c in cls.__mro__]
    names = [(c, name) for c, slots in own for name in ((slots,) if isinstance(slots, str) else slots)]
    private = [f"_{c}{name}" if name.startswith("__") and not name.endswith("__") else name for c, name in names]
    return [name for name in private if name not in ("__dict__", "__weakref__")]


def _contents(cell: types.CellType) -> Iterable[Any]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()  # nothing is in it yet


def _referent(proxy: Any) -> Any:
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def _rebuilt(value: Any) -> bool:
    """Whether an object is no more than a way to others: containers, functions and what binds them."""
    ways = (*CONTAINERS, tuple, frozenset, functools.partial, types.FunctionType, types.CellType, types.MethodType, types.BuiltinMethodType)
    return isinstance(value, ways)


def _later(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("expected a function that was led to the copy, found its place empty")
