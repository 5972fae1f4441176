"""Tensors that enter or leave a recomputed block by ways that its autograd Function does not see.

Inside of the Function nothing has a graph. A tensor with a gradient that is read there and is no input of it, such as one in a global,
would lose that gradient without a word. So would one that leaves inside of an object that is not taken apart.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_unwrapped, is_functorch_wrapped_tensor, is_gradtrackingtensor, maybe_get_level
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from lora_lite.clone.references import PLAIN
from lora_lite.core.tracing import transformed
from lora_lite.layers.access import ReadTensor


def forward_levels() -> frozenset[int]:
    """Return the levels of the forward-mode transforms that are active."""
    if not transformed():
        return frozenset()
    return frozenset(i.level() for i in retrieve_all_functorch_interpreters() if i.key() == TransformType.Jvp)


def carries(tensor: Tensor, forward: frozenset[int] = frozenset()) -> bool:
    """Whether a tensor has a gradient in plain autograd or a transform, or may have a tangent at one of the levels `forward`."""
    return any(t.requires_grad or (is_gradtrackingtensor(t) and maybe_get_level(t) in forward) for t in _layers(tensor))


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, and those that transforms have wrapped in it."""
    yield tensor
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
        yield tensor


class NoStrays(TorchFunctionMode):
    """Refuse tensors with a gradient that a block meets in its first run and that are none of its inputs.

    Args:
        name: the block, for messages.
        known: its inputs, and other tensors that it may read.
        smooth: those of the inputs that carry a gradient outside.
        forward: the levels of forward mode around it.
    """

    def __init__(self, name: str, known: Iterable[Tensor], smooth: Iterable[Tensor], forward: frozenset[int]) -> None:
        super().__init__()
        self._name, self._forward = name, forward
        self._known: dict[int, Tensor] = {}  # held, so that an `id` stays theirs
        self._add(known)
        self._made: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._note(smooth, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        met = [t for t in _tensors((args, kwargs)) if carries(t, self._forward) and not self._is_known(t)]
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError:
            if met:  # a tensor of a transform is of no use outside of it
                raise self._refusal(met[0], func) from None
            raise
        if met and func not in _DETACH and (result is None or any(_smooth(t) for t in _tensors(result))):
            raise self._refusal(met[0], func)
        own = [] if met else _tensors((args, result))  # a block may differentiate by itself, and ask that of what it has made
        self._add(t for t in own if carries(t, self._forward))
        given = list(_tensors((args, kwargs)))
        if func not in _DETACH and any(self._depends(t) for t in given):
            self._note((t for t in _tensors(result) if all(t is not g for g in given)), func)
        return result

    def _note(self, tensors: Iterable[Tensor], func: Any) -> None:
        self._made.update((id(t), (weakref.ref(t), func)) for t in tensors if _smooth(t))

    def _depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on inputs that carry a gradient."""
        return any((found := self._made.get(id(layer))) is not None and found[0]() is layer for layer in _layers(tensor))

    def hand_out(self, tensors: Iterable[Tensor]) -> None:
        """Take note of tensors that the block hands out, and may be held."""
        for layer in (layer for t in tensors for layer in _layers(t)):
            self._made.pop(id(layer), None)
            self._made.pop(id(layer._base), None)

    def require_no_escape(self) -> None:
        """Refuse that tensors made in the block are still held by anything but what it hands out."""

        def alive() -> list[tuple[Tensor, Any]]:
            return [(t, func) for ref, func in self._made.values() if func is not None and (t := ref()) is not None]

        if not alive():
            return
        gc.collect()  # some are held by cycles alone
        for tensor, func in alive()[:1]:
            raise ValueError(
                f"remat: {self._name} expected what is computed inside a block to leave it by its result, its arguments or attributes of "
                f"its modules, found that something else, such as a global or closure, keeps the outcome of {_name(func)}, of shape "
                f"{tuple(tensor.shape)}, which would have no gradient. Return it, keep a detached copy, or build without remat."
            )

    def _refusal(self, tensor: Tensor, func: Any) -> ValueError:
        return ValueError(
            f"remat: {self._name} expected tensors with a gradient to enter by its arguments or by attributes of its modules, found one of "
            f"shape {tuple(tensor.shape)} from elsewhere, such as a global or a closure, in {_name(func)}. Its gradient "
            "would be lost. Pass it as an argument, detach it, or build without remat."
        )

    def _add(self, tensors: Iterable[Tensor]) -> None:
        self._known.update((id(layer), layer) for t in tensors for layer in _layers(t))

    def _is_known(self, tensor: Tensor) -> bool:
        return any(id(layer) in self._known for layer in _layers(tensor))


def _name(func: Any) -> str:
    return resolve_name(func) or str(func)


_DETACH = frozenset((Tensor.detach, torch.detach))


def _smooth(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments of an operation. What is read of a stand-in for a weight comes from the params."""
    if isinstance(tree, Tensor):
        if not isinstance(tree, ReadTensor):
            yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return for each tensor how often it has been written to, itself or those that transforms have wrapped in it."""
    return [sum(layer._version for layer in _layers(t) if not layer.is_inference()) for t in tensors]


def require_unwritten(name: str, tensors: Sequence[Tensor], before: Sequence[int]) -> None:
    """Refuse that a block has written to its inputs: recomputed, it would begin with other values, and a gradient would pass by the change.

    Args:
        name: the block, for messages.
        tensors: its inputs after a run.
        before: their `versions` before it.
    """
    for tensor, old, new in zip(tensors, before, versions(tensors)):
        if old != new:
            raise ValueError(
                f"remat: {name} expected its inputs to stay as they are, found that it changes one of shape {tuple(tensor.shape)} "
                "in place, as nn.ReLU(inplace=True) does. Name a block around it that makes this tensor, or build without remat."
            )


def require_no_hidden(name: str, leaves: Iterable[Any], given: Sequence[Any], known: Iterable[Tensor]) -> None:
    """Refuse objects among what leaves a block, other than tensors and containers, that hold tensors computed in it.

    Args:
        name: the block, for messages.
        leaves: what leaves it.
        given: its arguments: an object that is handed through may stay as it is.
        known: the tensors that are not computed in it.
    """
    own = {*map(id, known), *map(id, given)}
    for leaf in leaves:
        if type(leaf) in PLAIN or id(leaf) in own or isinstance(leaf, Tensor | nn.Module | type):
            continue
        if any(isinstance(t, Tensor) and _smooth(t) and id(t) not in own for t in pytree.tree_leaves(dict(getattr(leaf, "__dict__", {})))):
            raise ValueError(
                f"remat: {name} expected tensors to leave it by themselves or in lists, tuples, dicts and dataclasses, found some "
                f"inside of a {type(leaf).__name__}, where their gradient would be lost. Return the tensors and make the "
                f"{type(leaf).__name__} outside of the block, or build without remat."
            )
