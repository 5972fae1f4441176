"""AWQ's layers of the layout GEMM: codes `(i, o)` of 4 bits in rows of int32, eight to each in an order of their own."""

from typing import Any

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind, unpack

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight neighbours lies in its integer


class AWQKind(PackedKind):
    """autoawq's `WQLinear_GEMM`: `(code - zero) * scale` for each group of inputs."""

    library, told_by = "awq", frozenset({"WQLinear_GEMM"})

    @classmethod
    def bits(cls, layer: Any) -> int:
        """Return the bits of a code."""
        return layer.w_bit

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        bits = cls.bits(layer)
        return None if bits == 4 else f"keeps {bits} bits, and AWQ's layout is read in 4: quantise to 4 bits"

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        codes, zeros = _columns(self.layer.qweight), _columns(self.layer.qzeros)
        grouped = codes.unflatten(1, (zeros.shape[1], -1)) - zeros[:, :, None]  # (o, groups, i / groups)
        return (grouped.to(dtype) * self.layer.scales.t()[:, :, None].to(dtype)).flatten(1)


class GPTQModelAWQKind(AWQKind):
    """GPTQModel's layers of that layout, which transformers loads AWQ's models with."""

    library, told_by = "gptqmodel", frozenset({"AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear"})

    @classmethod
    def bits(cls, layer: Any) -> int:
        return layer.bits

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        if getattr(layer, "adapter", None) is not None:
            return "adapts its input by itself: load the model without an adapter"
        return super().fault(layer)


def _columns(words: Tensor) -> Tensor:
    """Unpack `(n, o / 8)` integers into codes `(o, n)`."""
    return unpack(words.t(), 4).unflatten(0, (-1, 8))[:, list(_ORDER)].flatten(0, 1)
