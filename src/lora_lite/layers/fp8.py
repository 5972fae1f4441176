"""transformers' linear layers in FP8: a weight of one byte an entry, a scale for the whole, for blocks of it or for each row.

Their own forward quantises the inputs too. That is no linear map and has no derivative, so the adapted model leaves it out.
"""

from typing import Any

import torch
from torch import Tensor

from lora_lite.layers.packed import PackedKind


class FP8Kind(PackedKind):
    """`FP8Linear`, of the checkpoints that DeepSeek's have become the pattern of."""

    library, told_by = "transformers", frozenset({"FP8Linear"})
    scale = "weight_scale_inv"
    """The name of the layer's scale."""

    @classmethod
    def fits(cls, layer: Any) -> bool:
        return super().fits(layer) and layer.weight.dtype.itemsize == 1  # else it is a linear layer as others

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        if not layer.weight.dtype.is_floating_point:
            return "keeps two FP4 codes in a byte, which are not read: load the model with dequantize=True"
        return None

    def block(self) -> tuple[int, int] | None:
        """Return the shape of a block with a scale of its own, None for one scale."""
        return self.layer.block_size

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        weight, scale = self.layer.weight.detach().to(dtype), getattr(self.layer, self.scale).detach().float()
        block = self.block()
        if block is None:
            return weight.mul_(scale)
        scale = scale.view(-(-len(weight) // block[0]), -1)  # one for each row may lie in a row itself
        rows = scale.repeat_interleave(block[0], 0)[: len(weight)]
        for columns, own in zip(weight.split(block[1], 1), rows.unbind(1)):  # in place: no second dense matrix
            columns.mul_(own[:, None])
        return weight


class RowFP8Kind(FP8Kind):
    """`FbgemmFp8Linear` and `CompressedTensorsFP8Linear`: a scale for each row."""

    told_by, scale = frozenset({"FbgemmFp8Linear", "CompressedTensorsFP8Linear"}), "weight_scale"

    def block(self) -> tuple[int, int]:
        return 1, self.in_features
