"""A key-value cache taken apart by the members of a mixed batch, and joined again: each member's call writes the rows of its own.

A cache, as transformers has them, is an object that holds layers, or caches. Their tensors of two axes and more have the rows first.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lite.core.invocation import is_cache
from lora_lite.layers.by_member import taken


def caches_in(tree: Any) -> list[Any]:
    """Return the caches among arguments or in a result."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=is_cache) if is_cache(leaf)]


def require_no_cache(tree: Any) -> None:
    """Refuse caches where a call is compiled.

    Raises:
        ValueError: with the way out.
    """
    if caches := caches_in(tree):
        raise ValueError(
            f"expected a module without a key-value cache where a mixed batch is compiled, found a {type(caches[0]).__name__}. Pass "
            "use_cache=False where the model takes it, or call the model without torch.compile."
        )


class MemberCaches:
    """The caches of a call, of which each member's call gets a copy with its rows.

    Args:
        entries: of the call's input, on its first axis.
        member: of each row, which has one or several entries.
    """

    def __init__(self, entries: int, member: Tensor) -> None:
        self._all, self._count = torch.arange(entries, device=member.device), len(member)
        self._own: dict[int, Any] = {}  # by the id of a copy, the cache that it is of
        self._copies: dict[int, list[Any]] = {}

    def of_rows(self, cache: Any, rows: Tensor) -> Any:
        """Return a copy of a cache with some of its rows."""
        entries = taken(self._all, rows, self._count)
        made = _each(cache, lambda t: t[entries.to(t.device)] if t.dim() > 1 and len(t) == len(self._all) else t.clone())
        self._own[id(made)] = cache
        self._copies.setdefault(id(cache), []).append(made)
        return made

    def join(self, order: Sequence[Tensor]) -> None:
        """Join the copies as the members' calls have left them, in the caches of the call. `order` has the rows of each."""
        for parts in self._copies.values():
            vars(self._own[id(parts[0])]).update(vars(self._joined(parts, order)))

    def joined(self, parts: Sequence[Any], order: Sequence[Tensor]) -> Any:
        """Return the cache of the members' results: that of the call, or one that joins what each has made."""
        return self._own[id(parts[0])] if id(parts[0]) in self._own else self._joined(parts, order)

    def _joined(self, parts: Sequence[Any], order: Sequence[Tensor]) -> Any:
        entries = [taken(self._all, rows, self._count) for rows in order]
        return _joined(parts, [len(own) for own in entries], torch.cat(entries).argsort())


def _is_part(value: Any) -> bool:
    """Whether an object is a cache or one of its layers."""
    return is_cache(value) or hasattr(value, "lazy_initialization")


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy a cache, with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_each(v, change) for v in value]
    if isinstance(value, dict):
        return {key: _each(v, change) for key, v in value.items()}
    if not _is_part(value):
        return value
    new = copy.copy(value)
    vars(new).update({name: _each(v, change) for name, v in vars(value).items()})
    return new


def _joined(parts: Sequence[Any], rows: Sequence[int], order: Tensor) -> Any:
    """Join the members' copies of a cache, or of a part of it."""
    first = parts[0]
    if isinstance(first, Tensor):
        whole = first.dim() > 1 and all(isinstance(t, Tensor) and len(t) == n for t, n in zip(parts, rows))
        return torch.cat(list(parts))[order.to(first.device)] if whole else first
    if isinstance(first, list):
        return [_joined(each, rows, order) for each in zip_longest(*parts)]
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], rows, order) for key in first}
    if not _is_part(first):
        return first
    new = copy.copy(first)
    vars(new).update({name: _joined([vars(part).get(name) for part in parts], rows, order) for name in vars(first)})
    return new
