"""GPTQ's layers: codes `(i, o)` in columns of integers, a scale and a zero for each group of inputs.

auto-gptq keeps a zero less one, as GPTQ's first format has it. GPTQModel's plain kernels run the second format, with the zero itself.
Kernels with a layout of their own (exllama, marlin) are not read.
"""

from typing import Any

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind, unpack


class GPTQModelKind(PackedKind):
    """GPTQModel's layers: `(code - zero) * scale` by the group of each input, which `g_idx` names."""

    library, told_by = "gptqmodel", frozenset({"TorchLinear", "TritonV2Linear"})

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        if layer.bits not in (2, 3, 4, 8) or getattr(layer, "planar", False):
            return f"keeps {layer.bits} bits in planes: quantise to 2, 3, 4 or 8 bits in the format gptq or gptq_v2"
        if getattr(layer, "adapter", None) is not None or getattr(layer, "had_K", None) is not None:
            return "adapts or rotates its input by itself: load the model without an adapter and without rotation"
        return None

    def zeros(self) -> Tensor:
        """Return the zeros `(groups, o)`."""
        return unpack(self.layer.qzeros.t(), self.layer.bits).t()[:, : self.out_features]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        group = self.layer.g_idx.long()
        codes = unpack(self.layer.qweight, self.layer.bits)[: self.in_features]
        return ((codes - self.zeros()[group]).to(dtype) * self.layer.scales[group].to(dtype)).t()


class AutoGPTQKind(GPTQModelKind):
    """auto-gptq's layers, whose zeros are kept less one."""

    library = "auto_gptq"
    told_by = frozenset(f"qlinear_{name}.QuantLinear" for name in ("cuda", "cuda_old", "triton", "tritonv2"))

    def zeros(self) -> Tensor:
        zeros = super().zeros() + 1
        return zeros if self.layer.bits == 3 else zeros & (1 << self.layer.bits) - 1  # as the library's own forward has it

    @property
    def in_features(self) -> int:
        return self.layer.infeatures

    @property
    def out_features(self) -> int:
        return self.layer.outfeatures
