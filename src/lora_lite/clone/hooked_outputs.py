"""Hidden outputs of a recomputed block: those that hooks keep.

Inside of a recomputed block nothing has a graph: what leaves it has to be a result of its autograd Function, or its gradient is lost.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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
