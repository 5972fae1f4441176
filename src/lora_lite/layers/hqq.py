"""HQQ's `HQQLinear`: codes of 8, 4, 3, 2 or 1 bits in groups along either axis, with a scale and a zero for each."""

from typing import Any

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind


class HQQKind(PackedKind):
    """`(code - zero) * scale`, in the layer's compute dtype. A byte, or an int32 for 3 bits, holds codes of rows that lie far apart."""

    library, told_by = "hqq", frozenset({"HQQLinear"})

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        if layer.W_q is None or layer.meta is None:
            return "is not quantised yet: call its initialize(), or load its state"
        if layer.meta.get("quant_scale") or layer.meta.get("quant_zero"):
            return "has quantised scales or zeros, which HQQ no longer makes: quantise with quant_scale=False and quant_zero=False"
        return None

    @property
    def _shape(self) -> tuple[int, int]:
        return self.layer.meta["shape"] if self.layer.meta else (0, 0)  # asked before `fault` is

    @property
    def in_features(self) -> int:
        return self._shape[1]

    @property
    def out_features(self) -> int:
        return self._shape[0]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        meta, codes = self.layer.meta, self.layer.W_q.detach()
        scale, zero = meta["zero_scale"].flip(0) if "zero_scale" in meta else (meta["scale"], meta["zero"])
        if meta["packing"]:
            codes = _unpacked(codes.view(meta["unpack_view_dtype"]) if meta["view_as_float"] else codes, meta["packing"])
        o, i = meta["shape"]
        codes = codes[: o * i // codes.shape[1]]  # 3 bits are padded to tens of rows
        device = codes.device
        return ((codes.to(dtype) - zero.to(device, dtype)) * scale.to(device, dtype)).reshape(o, i)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.layer.compute_dtype


def _unpacked(words: Tensor, packing: str) -> Tensor:
    bits = int(packing[0])
    lanes = 10 if bits == 3 else 8 // bits
    return torch.cat([words >> bits * lane & (1 << bits) - 1 for lane in reversed(range(lanes))])
