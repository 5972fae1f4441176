"""Masks of positions, noted at each call of a copy's root, for modules whose variants act at some positions only."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.one_thread import OneThread

_NOTED = "_lora_lite_noted"

After = Callable[[Any], None]
Masks = Callable[[nn.Module, Mapping[str, Any]], Tensor | tuple[Tensor | None, After] | None]
"""A function of the root and of its call's arguments, with None for those that are not given. It returns a mask `(b, t)`, or None for all
positions; with a function of the call's output beside it, where there is something to do after the call."""


class _Place(NamedTuple):
    path: str
    buffer: str
    masks: Masks


def note(clone: nn.Module, path: str, buffer: str, masks: Masks) -> None:
    """Make a copy's root note a mask in a buffer of the module at `path` during each call. Equal `masks` run once a call."""
    clone.get_submodule(path).register_buffer(buffer, None, persistent=False)
    if _NOTED not in vars(clone):
        own = vars(clone).pop("forward", None) or functools.partial(type(clone).forward, clone)
        thread = OneThread("the positions at which it acts")
        forward = functools.partial(_forward, clone, thread, own, tuple(inspect.signature(own).parameters))
        vars(forward)["__signature__"] = inspect.signature(own)  # generate asks for it
        vars(clone)["forward"] = forward
    vars(clone)[_NOTED] = (*vars(clone).get(_NOTED, ()), _Place(path, buffer, masks))


def _forward(root: nn.Module, thread: OneThread, own: Any, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return _run(root, own, names, args, kwargs)
    is_first = thread.begin(root)
    try:
        return _run(root, own, names, args, kwargs)
    finally:
        if is_first:
            thread.end(root)


def _run(root: nn.Module, own: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = {**dict.fromkeys(names), **dict(zip(names, args)), **kwargs}
    places: Sequence[_Place] = vars(root)[_NOTED]
    found = {masks: _both(masks(root, given)) for masks in dict.fromkeys(place.masks for place in places)}
    with _laid([(root.get_submodule(place.path)._buffers, place.buffer, found[place.masks][0]) for place in places]):
        output = own(*args, **kwargs)
    for _, after in found.values():
        after(output)
    return output


def _both(found: Any) -> tuple[Tensor | None, After]:
    """Return a mask and what follows the call, from what a function of masks returned.

    Raises:
        TypeError: where it returned anything else.
    """
    mask, after = found if isinstance(found, tuple) and len(found) == 2 else (found, _nothing)
    if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)) or not callable(after):
        shown = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(found)
        raise TypeError(f"acts_at: expected a mask (b, t) of a call's positions, or None for all, found {shown}. Return one row a text.")
    return mask, after


def _nothing(output: Any) -> None:
    pass


@contextmanager
def _laid(masks: list[tuple[dict[str, Tensor | None], str, Tensor | None]]) -> Iterator[None]:
    before = [table[name] for table, name, _ in masks]
    try:
        for table, name, mask in masks:
            table[name] = mask
        yield
    finally:
        for (table, name, _), mask in zip(masks, before):
            table[name] = mask
