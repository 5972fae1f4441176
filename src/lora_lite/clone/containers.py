"""Mutable containers among the inputs and outputs of a recomputed block: lists, mappings, dataclasses.

A block may write into them for whoever reads them next. Autograd sees neither: the inputs of a Function are tensors alone, and so are its
outputs. So the tensors in them become inputs, each run gets copies of the containers, and values that it has put into these become outputs.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.clone.references import PLAIN

Contents = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a container in a tree."""

    number: int


class Containers:
    """Containers that are taken out of trees, each once, wherever they stand.

    Args:
        objects: those that are known beforehand.

    Attributes:
        objects: the containers.
        contents: of each, its values by key, index or name, with the containers among them taken out too. Those of `objects` are left out.
    """

    def __init__(self, objects: Iterable[Any] = ()) -> None:
        self.objects = list(objects)
        self.contents: list[Contents] = [{} for _ in self.objects]
        self._numbers = {id(value): n for n, value in enumerate(self.objects)}
        self._start = [_items(value) for value in self.objects]

    def take(self, tree: Any) -> Any:
        """Return a tree with places instead of its containers. Their contents are taken in turn."""
        return tree if type(tree) is Tensor or type(tree) in PLAIN else pytree.tree_map(self._taken, tree, is_leaf=_holds)

    def _taken(self, value: Any) -> Any:
        if not _holds(value):
            return value
        number = self._numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
            self.contents.append({})
            self.contents[number].update({key: self.take(v) for key, v in _items(value).items()})
        return Place(number)

    def put(self, tree: Any) -> Any:
        """Return a tree with the containers in their places."""
        if not self.objects:
            return tree
        return pytree.tree_map(lambda v: self.objects[v.number] if isinstance(v, Place) else v, tree)

    def copies(self, contents: Iterable[Contents]) -> "Containers":
        """Return copies of the containers with these contents."""
        made = Containers(map(_empty, self.objects))
        made.fill(enumerate(contents))
        made._start = [_items(value) for value in made.objects]
        return made

    def fill(self, contents: Iterable[tuple[int, Contents]]) -> None:
        """Replace the contents of containers, by number."""
        for number, content in contents:
            _fill(self.objects[number], {key: self.put(v) for key, v in content.items()})

    def news(self) -> dict[int, Contents]:
        """Return the contents of those known beforehand that have changed since, and of all others, by number."""
        known = list(zip(self.objects, self._start))
        changed = {n: items for n, (value, start) in enumerate(known) if not _same(items := _items(value), start)}
        taken = {n: {key: self.take(v) for key, v in items.items()} for n, items in changed.items()}
        return taken | dict(list(enumerate(self.contents))[len(known) :])

    def others(self) -> list[Any]:
        """Return an empty container for each that was not known beforehand."""
        return [_empty(value) for value in self.objects[len(self._start) :]]


def _holds(value: Any) -> bool:
    kind = type(value)
    if kind is list or kind is dict:
        return True
    return (isinstance(value, UserDict) or _is_record(kind)) and kind not in pytree.SUPPORTED_NODES


def _is_record(kind: type) -> bool:
    """Whether instances are dataclasses or the like: they hold what their attributes say."""
    return issubclass(kind, SimpleNamespace) or (dataclasses.is_dataclass(kind) and not issubclass(kind, Tensor | nn.Module | Place))


def _items(value: Any) -> Contents:
    if isinstance(value, list):
        return dict(enumerate(value))
    if isinstance(value, dict | UserDict):
        return dict(value)
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []  # with slots there is no `__dict__`
    return {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})


def _same(items: Contents, start: Contents) -> bool:
    """Whether keys and values are the same objects, in the same order."""
    return len(items) == len(start) and all(k == j and v is w for (k, v), (j, w) in zip(items.items(), start.items()))


def _empty(value: Any) -> Any:
    """Return a container of the same type without its contents."""
    if not isinstance(value, UserDict):
        kind: Any = type(value)
        return kind.__new__(kind)
    value = copy.copy(value)
    value.data = {}
    return value


def _fill(value: Any, items: Contents) -> None:
    if isinstance(value, list):
        value[:] = items.values()
    elif isinstance(value, dict | UserDict):
        value.clear()
        value.update(items)
    else:
        for name in _items(value).keys() - items.keys():
            object.__delattr__(value, name)
        for name, v in items.items():
            object.__setattr__(value, name, v)  # of a frozen dataclass too
