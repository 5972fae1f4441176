"""Count multiply-adds per token of a variant by running its pure function on shapes alone.

Matrix products count `m n k`, products of two tensors entry by entry count one an entry, as in the literature's tables. What is
paid once per forward, whatever the number of tokens, is left out by counting two sizes and taking the difference.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lite.clone.bind import apply_variant
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen
from lora_lite.layers.embedding import FrozenEmbedding

aten = torch.ops.aten
_MATMULS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
_PRODUCTS = (aten.mul, aten.div, aten.addcmul, aten.addcdiv)


class _Counter(TorchDispatchMode):
    """Add up the multiply-adds of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _MATMULS:
            left, right = args[_MATMULS[packet]], args[_MATMULS[packet] + 1]
            self.macs += left.numel() * right.shape[-1]
        elif packet in _PRODUCTS and all(isinstance(a, Tensor) for a in args[:2]):
            self.macs += out.numel()
        return out


def macs_per_token(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen) -> int:
    """Count what a variant adds to one token of one layer, the layer's own `i o` taken off.

    Args:
        cfg: the variant.
        params: one target's params; only their shapes are used.
        W: the frozen layer; only shapes are used.
    """
    meta = {name: torch.empty(p.shape, device="meta") for name, p in params.items()}
    constants = {name: torch.empty(c.shape, dtype=c.dtype, device="meta") for name, c in W.constants.items()}
    bias = None if W.bias is None else torch.empty(W.out_features, device="meta")
    layer: Frozen = Frozen(torch.empty(W.out_features, W.in_features, device="meta"), bias, constants)
    if isinstance(W, FrozenEmbedding):  # a lookup multiplies nothing
        layer = W.to("meta")

    def count(tokens: int) -> int:
        x = torch.empty(tokens, W.in_features, device="meta")
        with _Counter() as counter, torch.no_grad():
            apply_variant(cfg, meta, layer, x[:, 0].long() if W.one_hot else x)
        return counter.macs

    # From 3 tokens to 5: one token alone would turn products with a vector into other operations.
    return (count(5) - count(3)) // 2 - (0 if W.one_hot else W.in_features * W.out_features)
