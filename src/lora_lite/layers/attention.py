"""Attention in a module that `vmap` maps over rows, as one call for all of them.

Torch's fused attention on a CPU is none that `vmap` can map: it would run row by row, and give no gradient to a mask, such as a bias of
positions that the module itself makes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_lite.core.tracing import beneath_vmap, by_vmap
from lora_lite.layers.replaced import Functions


def _attended(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    given = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if not any(map(by_vmap, given)) or {t.dim() for t in given[:3]} != {4} or any(t.dim() > 4 for t in given):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    b, dims = query.shape[0], [t.dim() for t in given]

    def once(*tensors: Tensor) -> Tensor:
        rows = next(len(t) for t, dim in zip(tensors, dims) if t.dim() > dim)
        whole = [_batched(t, dim, rows, b) for t, dim in zip(tensors, dims)]
        y = F.scaled_dot_product_attention(whole[0], whole[1], whole[2], whole[3] if whole[3:] else None, *args, **kwargs)
        return y.unflatten(0, (rows, b))

    return beneath_vmap(once, *given)


def _batched(t: Tensor, dim: int, rows: int, b: int) -> Tensor:
    """Return a tensor with the rows, and what each has on its first of four axes, on one axis."""
    t = t if t.dim() > dim else t[None]
    t = t.reshape(len(t), *(1,) * (4 - dim), *t.shape[1:])
    return t.expand(rows, b if t.shape[1] == 1 else -1, *t.shape[2:]).flatten(0, 1)


ATTENTION: Functions = {F.scaled_dot_product_attention: _attended}
"""Functions for a module that `vmap` maps and that may hold attention."""
