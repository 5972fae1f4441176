"""transformers' packed linear layers of Gemma: codes of 2, 4 or 8 bits, a scale for each row.

Where a checkpoint has scales of activations, their own forward rounds inputs and outputs. That is no linear map, so the adapted model
leaves it out.
"""

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind, unpack


class GemmaKind(PackedKind):
    """`QuantizedLinear`."""

    library, told_by = "transformers", frozenset({"gemma_quant.QuantizedLinear"})

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        bits, codes = self.layer.num_bits, self.layer._parameters["weight"].detach()
        if bits < 8:
            codes = unpack(codes.t(), bits).t()[:, : self.in_features] - 2 ** (bits - 1)
        return codes.to(dtype) * self.layer.weight_scale.detach().to(dtype)
