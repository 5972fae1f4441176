"""`nn.Embedding` as a kind of target: a linear map `W = E^T`, `(d, vocab)`, of one-hot inputs, given as token ids.

Nothing one-hot is ever formed: `W(x)` is the lookup, and `W.project(x, A)` a lookup of `A`'s columns. Models that scale their lookups
(Gemma's) have the scale in `W`.
"""

from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.core.frozen import FrozenLinear


class FrozenEmbedding(FrozenLinear):
    """The kind of `nn.Embedding`: `x` holds ids `(*b)`, `i` is the vocabulary, `o` the width."""

    gives: ClassVar[AbstractSet[str]] = frozenset({"output", "project"})
    one_hot: ClassVar[bool] = True
    observed: ClassVar[bool] = False
    why: ClassVar[str] = "An embedding is given token ids, and has no input vectors."

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        own = type(layer).forward is not nn.Embedding.forward
        scaled = type(layer).__name__.endswith("ScaledWordEmbedding") and hasattr(layer, "embed_scale")
        return layer.max_norm is None and (scaled or not own)  # a norm's bound is kept by writing to the weight

    @property
    def weight(self) -> Tensor:
        weight = self._layer.weight
        scale = self._scale(weight)
        return weight.t() if scale is None else (weight * scale).t()

    @property
    def bias(self) -> None:
        return None

    @property
    def in_features(self) -> int:
        return self._layer.num_embeddings

    @property
    def out_features(self) -> int:
        return self._layer.embedding_dim

    @property
    def device(self) -> torch.device:
        return self._layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._layer.weight.dtype

    def _scale(self, like: Tensor) -> Any:
        scale = getattr(self._layer, "embed_scale", None)
        return scale.to(like.dtype) if isinstance(scale, Tensor) else scale

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        layer = self._layer  # sparse gradients are for the weight, which has none
        return F.embedding(x, table, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)

    def _scaled(self, y: Tensor) -> Tensor:
        scale = self._scale(y)
        return y if scale is None else y * scale

    def __call__(self, x: Tensor) -> Tensor:
        """Look tokens up: ids `(*b)` to `(*b, o)`."""
        return self._scaled(self._look_up(x, self._layer.weight))

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        h = self._scaled(self._look_up(x, A.t()))
        if dropout and self.training:  # an entry of a one-hot input is a token
            h = h * F.dropout(torch.ones(x.shape, dtype=h.dtype, device=h.device), dropout)[..., None]
        return h

    def rows(self, x: Tensor) -> Tensor:
        return torch.empty((*x.shape, self.in_features), dtype=self.dtype, device="meta")

    def to(self, where: torch.dtype | str) -> "FrozenEmbedding":
        """Give the same lookup in another dtype or on another device."""
        names = ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "training")
        facts = {name: getattr(self._layer, name) for name in names}
        scale = getattr(self._layer, "embed_scale", None)
        return FrozenEmbedding(SimpleNamespace(weight=self._layer.weight.to(where), embed_scale=scale, **facts))

    def to_weight(self, dense: Tensor) -> Tensor:
        scale = self._scale(dense)
        return dense.t() if scale is None else dense.t() / scale
