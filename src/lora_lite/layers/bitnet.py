"""transformers' packed layers of BitNet: four entries of -1, 0 or 1 in a byte, which one number divides.

Their own forward rounds the inputs too. That is no linear map, so the adapted model leaves it out.
"""

from typing import Any

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind


class BitLinearKind(PackedKind):
    """`BitLinear`. One that normalises its inputs first is not read: that is no linear map."""

    library, told_by = "transformers", frozenset({"bitnet.BitLinear"})

    @classmethod
    def fits(cls, layer: Any) -> bool:
        return super().fits(layer) and getattr(layer, "rms_norm", None) is None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        codes, scale = self.layer.weight, self.layer.weight_scale
        return torch.cat([(codes >> 2 * k & 3).to(dtype) - 1 for k in range(4)]) / scale.to(dtype)  # a byte has rows far apart
