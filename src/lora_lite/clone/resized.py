"""The `resize_token_embeddings` of a module that `adapt.module` made: it puts other layers in the place of those that are adapted."""

import functools
from typing import Any

from torch import nn

from lora_lite.clone.reads import bindings
from lora_lite.core.errors import listed
from lora_lite.layers.access import HOST

_RESIZE = "resize_token_embeddings"


def refuse_resized_targets(root: nn.Module) -> None:
    """Let a copy refuse to replace embeddings and heads that are targets, in place. Their params would be lost in silence."""
    if hasattr(root, _RESIZE):
        vars(root)[_RESIZE] = functools.partial(_resize, root)


def _resize(root: Any, *args: Any, **kwargs: Any) -> Any:
    tables = (root.get_input_embeddings(), root.get_output_embeddings())
    bound = [b for leader in bindings(root).values() for b in (leader, *leader.followers)]
    lost = dict.fromkeys(b.path for b in bound if any(vars(b.W.layer)[HOST] is table for table in tables))
    if lost and any(value is not None for value in (*args, *kwargs.values())):
        raise ValueError(
            f"{_RESIZE}: expected embeddings without an adapter, found one at {listed(lost)}, which new layers would not have. Resize the "
            "model and build again, or leave these layers out."
        )
    return getattr(type(root), _RESIZE)(root, *args, **kwargs)
