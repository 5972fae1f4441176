"""The rows of a mixed batch inside `torch.compile`.

The compiler traces with shapes alone, and one graph may serve several. So the graph has an operator without a result, which is run on each
batch before the model is, and raises as an eager call does. A batch of shapes that have passed costs it one look-up.

The operator takes the batch's tensors and numbers, and the name of its graph, under which the rest of the batch is found: the keys, and
what else is fixed in the graph.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._library.effects import EffectType

Layout = tuple[Any, ...]
"""A part of a batch without its tensors and numbers, as nested tuples that the compiler takes for constants."""

Unsure = tuple[str, tuple[str, ...] | None, tuple[str, ...]]
"""The path of a target that is to be checked, and the places of the tensors beside its input that were taken for rows, and for shared.

With None in the place of the first its input is to be checked.
"""

_FIXED = (bool, str, type(None), torch.dtype)


class Graph:
    """A compiled graph, with all that it needs to check the rows of its batches.

    Args:
        layout: of the batch, as `taken_apart` returns it.
        check: raises where a batch's rows are not known, from the batch, the number of its rows, and the targets in `unsure`. It is given
            None for a batch with objects that no graph can hand over.

    Attributes:
        name: by which the operator finds it.
        unsure: the targets of which the shapes that were traced do not show the rows.
    """

    def __init__(self, layout: Layout, check: Callable[[Any, int, Sequence[Unsure]], None]) -> None:
        self.name, self._layout, self._check = str(next(_NUMBERS)), layout, check
        self.unsure: list[Unsure] = []
        self._passed: set[tuple[Any, ...]] = set()
        _GRAPHS[self.name] = self

    def see(self, tensors: Sequence[Tensor], numbers: Sequence[int], floats: Sequence[float], rows: int) -> None:
        """Check a batch. Shapes that have passed are not checked again."""
        shapes = (rows, *numbers, *(t.shape for t in tensors))
        if shapes not in self._passed:
            batch = None if _has_object(self._layout) else put_together(self._layout, iter(tensors), iter(numbers), iter(floats))
            self._check(batch, rows, self.unsure)
            self._passed.add(shapes)


_NUMBERS = itertools.count()
_GRAPHS: WeakValueDictionary[str, Graph] = WeakValueDictionary()  # an adapt owns its graphs: compiled code keeps no model alive


@torch.library.custom_op("lora_lite::see_rows", mutates_args=())
def _see_rows(tensors: Sequence[Tensor], numbers: Sequence[int], floats: Sequence[float], rows: int, graph: str) -> None:
    found = _GRAPHS.get(graph)
    if found is None:
        raise RuntimeError(
            "adapt.mixed: expected compiled code to run in the process that compiled it, while its adapt is alive, found no such adapt. "
            "Compile the function again."
        )
    found.see(tensors, numbers, floats, rows)


@_see_rows.register_fake
def _(tensors: Sequence[Tensor], numbers: Sequence[int], floats: Sequence[float], rows: int, graph: str) -> None:
    return


@_see_rows.register_vmap
def _(
    info: Any, in_dims: Any, tensors: Sequence[Tensor], numbers: Sequence[int], floats: Sequence[float], rows: int, graph: str
) -> tuple[None, None]:
    """Show one batch of many: they have the same shapes."""
    one = [t if d is None else t.select(d, 0) for t, d in zip(tensors, in_dims[0])]
    torch.ops.lora_lite.see_rows(one, numbers, floats, rows, graph)
    return None, None


_see_rows.register_effect(EffectType.ORDERED)  # or the compiler would leave it out, since nothing comes of it


def see_rows(parts: tuple[list[Tensor], list[int], list[float]], rows: int, graph: str) -> None:
    """Put the operator into the graph that is traced."""
    tensors, numbers, floats = parts
    torch.ops.lora_lite.see_rows([t.detach() for t in tensors], numbers, floats, rows, graph)


def taken_apart(part: Any, tensors: list[Tensor], numbers: list[int], floats: list[float]) -> Layout:
    """Take a batch apart into what an operator takes, appended to the lists, and a layout."""
    if isinstance(part, Tensor):
        tensors.append(part)
        return ("tensor",)
    if isinstance(part, _FIXED):
        return ("fixed", part)
    if isinstance(part, int):  # the compiler may trace it as a symbol
        numbers.append(part)
        return ("number",)
    if isinstance(part, float):
        floats.append(part)
        return ("float",)
    if isinstance(part, Mapping):
        return ("mapping", *[(key, taken_apart(value, tensors, numbers, floats)) for key, value in part.items()])
    if type(part) is tuple or type(part) is list:
        return ("tuple" if type(part) is tuple else "list", *[taken_apart(value, tensors, numbers, floats) for value in part])
    return ("object",)


def put_together(layout: Layout, tensors: Any, numbers: Any, floats: Any) -> Any:
    """Undo `taken_apart`, from iterators."""
    kind, *inner = layout
    if kind == "fixed":
        return inner[0]
    if kind == "mapping":
        return {key: put_together(value, tensors, numbers, floats) for key, value in inner}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(put_together(value, tensors, numbers, floats) for value in inner)
    return next({"tensor": tensors, "number": numbers, "float": floats}[kind])


def _has_object(layout: Layout) -> bool:
    kind, *inner = layout
    values = [value for _, value in inner] if kind == "mapping" else inner if kind in ("tuple", "list") else []
    return kind == "object" or any(map(_has_object, values))
