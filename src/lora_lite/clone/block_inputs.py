"""Hidden inputs and outputs of a recomputed block: mappings that it writes into, outputs that hooks keep.

Inside of a recomputed block nothing has a graph: what leaves it has to be a result of its autograd Function, or its gradient is lost.
"""

import copy
import functools
import weakref
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.core.errors import listed

Seen = list[tuple[str, "weakref.ref[Tensor]"]]


@contextmanager
def watched(block: nn.Module) -> Iterator[Seen]:
    """Record the outputs that modules inside a block hand to their hooks during its first run."""
    seen: Seen = []

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.extend((path, weakref.ref(t)) for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())

    hooked = [(path, m) for path, m in block.named_modules() if m is not block and m._forward_hooks]
    handles = [m.register_forward_hook(functools.partial(note, path)) for path, m in hooked]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def require_no_escape(seen: Seen, kept: set[int]) -> None:
    """Refuse hooks that keep an inner output of a recomputed block: without a graph, a loss of it has no gradient."""
    escaped = sorted({path for path, ref in seen if (t := ref()) is not None and id(t) not in kept})
    if escaped:
        raise ValueError(
            f"remat: expected what is computed inside a block to stay there, found a hook that keeps an output of {listed(escaped)}, which "
            "would have no gradient. Leave out what asks for it, such as output_router_logits or output_attentions, or build without remat "
            "and without the model's own gradient checkpointing."
        )


@dataclass(frozen=True)
class _Note:
    """The place of a mapping among a block's inputs. Blocks may write values there for later blocks, as Gemma 3n's do with keys."""

    number: int


def without_notes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """Take mappings out of a block's inputs. Their values become inputs, and values written into them become results."""
    notes: list[Any] = []

    def taken(value: Any) -> Any:
        if type(value) is not dict and not isinstance(value, UserDict):
            return value
        notes.append(value)
        return _Note(len(notes) - 1)

    args, kwargs = tuple(taken(v) for v in args), {name: taken(v) for name, v in kwargs.items()}
    return notes, args, kwargs


def with_notes(
    notes: list[Any], contents: list[dict[Any, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """Put copies of mappings, with these contents, back among a block's inputs. Return the copies too."""
    own = [_copy(note, dict(content)) for note, content in zip(notes, contents)]

    def back(value: Any) -> Any:
        return own[value.number] if isinstance(value, _Note) else value

    return own, tuple(back(v) for v in args), {name: back(v) for name, v in kwargs.items()}


def _copy(note: Any, content: dict[Any, Any]) -> Any:
    if type(note) is dict:
        return content
    note = copy.copy(note)
    note.data = content
    return note


def written(own: list[Any], contents: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Return the values that a block wrote into its copies of mappings."""
    return [{key: v for key, v in note.items() if v is not content.get(key, note)} for note, content in zip(own, contents)]
