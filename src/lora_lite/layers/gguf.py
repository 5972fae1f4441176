"""Linear layers whose weight stays in the blocks of a GGUF file, in transformers and in diffusers: a format for each layer, 2 to 8 bits.

The libraries unpack the blocks. They are loaded where such a layer exists.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind


class GgufKind(PackedKind):
    """transformers' `GgufLinear`."""

    library, told_by = "transformers", frozenset({"GgufLinear"})

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        blocks: Any = sys.modules["transformers.integrations.gguf.dequant"]
        flat: Tensor = blocks.dequantize(self.layer._parameters["weight"].detach(), self.layer.ggml_type, dtype)
        dense, order = flat.reshape(self.out_features, self.in_features), self.layer.input_permutation
        return dense if order is None else torch.empty_like(dense).index_copy(1, order, dense)


class DiffusersGgufKind(PackedKind):
    """diffusers' `GGUFLinear`."""

    library, told_by = "diffusers", frozenset({"GGUFLinear"})

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        of: Any = type(self.layer)
        dense: Tensor = of.forward.__globals__["dequantize_gguf_tensor"](self.layer._parameters["weight"])
        return dense.detach().to(dtype)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.layer.compute_dtype or dtype
