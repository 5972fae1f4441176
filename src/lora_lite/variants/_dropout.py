"""Dropout of an update's outputs, and of a whole update: `rank_dropout` and `module_dropout` of the LyCORIS family."""

import torch
from torch import Tensor

from lora_lite.core import Frozen


def kept(W: Frozen, like: Tensor, rank_dropout: float, module_dropout: float, rescale: bool) -> Tensor | None:
    """Draw the factors of an update's outputs `(o,)` for one call in training mode, or return None where nothing is dropped.

    Args:
        W: the layer, which knows its mode.
        like: a tensor of the factors' dtype and device.
        rank_dropout: probability of a zero.
        module_dropout: probability that all are zero.
        rescale: whether to divide the rest by their share of the outputs.
    """
    if not W.training or not (rank_dropout or module_dropout):
        return None
    stays = (torch.rand(W.out_features, device=like.device) >= rank_dropout).to(like.dtype)
    if rescale:
        stays = stays / stays.mean().clamp_min(1 / W.out_features)  # none at all is no division by zero
    return stays * (torch.rand(1, device=like.device) >= module_dropout)
