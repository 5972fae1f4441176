"""`nn.Embedding`: a linear map `W = E^T`, `(d, vocab)`, of one-hot inputs, given as token ids.

Nothing one-hot is ever formed: `W(x)` is the lookup, and `W.project(x, A)` a lookup of `A`'s columns. Models that scale their lookups
(Gemma's) have the scale in `W`.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.core.frozen import Frozen, Start
from lora_lite.layers.access import raw
from lora_lite.layers.identity import Release, block_rows, exact_dtype
from lora_lite.layers.kind import Kind, Params, Variant
from lora_lite.layers.linear import LinearKind, holds_codes
from lora_lite.layers.replaced import Functions
from lora_lite.layers.tensors import Part

_SCALES = ("embed_scale", "scalar_embed_scale")


class EmbeddingKind(Kind):
    """`nn.Embedding`: `x` holds ids `(*b)`, `i` is the vocabulary, `o` the width."""

    classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    by_name: ClassVar[bool] = True
    gives: ClassVar[AbstractSet[str]] = frozenset({"output", "project", "rows", "dropout"})
    state = {"weight": "weight"}  # noqa: RUF012  # read only
    facts: ClassVar[tuple[str, ...]] = ("padding_idx", "scale_grad_by_freq", *_SCALES)
    """The attributes of the layer that a lookup depends on."""
    why: ClassVar[str] = "An embedding receives token ids, which are no vectors."

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer)) and not holds_codes(layer)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return layer.max_norm is None and cls.known(layer)  # `max_norm` writes to the weight

    @classmethod
    def known(cls, layer: nn.Module) -> bool:
        """Whether the forward of an embedding is torch's, or one of transformers' that scales what it looks up."""
        scaled = type(layer).__name__.endswith("ScaledWordEmbedding") and hasattr(layer, "embed_scale")
        return scaled or type(layer).forward is nn.Embedding.forward

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        scale = self._scale(weight)
        return weight.t() if scale is None else (weight * scale).t()

    @property
    def in_features(self) -> int:
        return self.layer.weight.shape[0]  # a table that was put in place may have other rows than `num_embeddings`

    @property
    def out_features(self) -> int:
        return self.layer.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def _scale(self, like: Tensor) -> Any:
        scale = getattr(self.layer, "embed_scale", None) if "embed_scale" in self.facts else None
        if not isinstance(scale, Tensor):
            return scale
        if scale.is_meta and not like.is_meta:  # the weights of an outline come from files, which hold no such buffer
            scale = torch.tensor(self.layer.scalar_embed_scale, device=like.device)
        return scale.to(like.dtype)

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        layer = self.layer  # sparse gradients are for the weight, which has none
        return looked_up(x, table, layer.padding_idx, layer.scale_grad_by_freq)

    def _scaled(self, y: Tensor) -> Tensor:
        scale = self._scale(y)
        return y if scale is None else y * scale

    def __call__(self, x: Tensor) -> Tensor:
        """Look tokens up: ids `(*b)` to `(*b, o)`."""
        return self._scaled(self._look_up(x, self.layer.weight))

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        h = self._scaled(self._look_up(x, A.t()))
        if dropout and self.training:  # an entry of a one-hot input is a token
            h = h * F.dropout(torch.ones(x.shape, dtype=h.dtype, device=h.device), dropout)[..., None]
        return h

    @property
    def table_shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def add_rows(self, x: Tensor, index: Tensor, D: Tensor) -> Tensor:
        """Look moved tokens up in `D`, of which each token finds its own row by bisection."""
        known, order = index.sort()
        place = torch.searchsorted(known, x.contiguous()).clamp(max=len(index) - 1)
        row = torch.where(known[place] == x, order[place], len(index))  # a row of zeros for the other tokens
        if self.layer.padding_idx is not None:  # whose row gets no gradient by a lookup
            D = torch.where((index == self.layer.padding_idx)[:, None], D.detach(), D)
        moved = F.embedding(row, torch.cat([D, D.new_zeros(1, D.shape[1])]), scale_grad_by_freq=self.layer.scale_grad_by_freq)
        return self(x) + self._scaled(moved)

    def sharer(self, module: nn.Module) -> Kind | None:
        return of_rows_in(module, self.constants)

    def low_rank_start(self, r: int, generator: torch.Generator, draw: Start | None = None) -> tuple[Tensor, Tensor]:
        """Draw `B` and leave `A` at zero, as every start does here: tokens that training never sees so stay as they were."""
        return torch.zeros(r, self.in_features), torch.randn(self.out_features, r, generator=generator)

    def vectors(self, x: Tensor) -> Tensor:
        return torch.empty((*x.shape, self.in_features), dtype=self.dtype, device="meta")

    def _to(self, where: torch.dtype | str) -> "EmbeddingKind":
        """Return the same lookup in another dtype or on another device, in evaluation mode."""
        facts = {name: getattr(self.layer, name) for name in self.facts if hasattr(self.layer, name)}
        constants = {name: c.to(where) if isinstance(where, str) else c for name, c in self.constants.items()}
        weight = self.layer.weight.to(where) if isinstance(where, str) else self.layer.weight
        layer = SimpleNamespace(weight=weight, training=False, **facts)
        return EmbeddingKind(layer, constants) if isinstance(where, str) else _Cast(layer, constants, where)

    def adapted(self, f: Variant, params: Params, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """Look every token up. One-hot inputs sum to one, so that a constant added to every output is part of the table."""
        W = self if dtype in (None, self.dtype) else self._to(dtype)
        return f(params, W, torch.arange(self.in_features, device=self.device)).t()

    def shifts(self, f: Variant, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return False  # the table holds it

    def changes(self, f: Variant, params: Params) -> list[tuple[Tensor, Tensor]]:
        """Return the update of the table before lookups are scaled, since `project` scales factors of it in the same way."""
        delta = self.adapted(f, params, "weight", torch.float64) - self.dense(torch.float64)
        scale = self._scale(delta)
        return [(delta if scale is None else delta / scale, delta.new_zeros(len(delta)))]

    def merged(self, f: Variant, params: Params) -> dict[str, Tensor]:
        return {"weight": self.to_weight(self.adapted(f, params, "weight", exact_dtype(self.dtype)))}

    @torch.no_grad()
    def merged_parts(self, f: Variant, params: Params, release: Release = lambda: None) -> Iterator[Part]:
        W = self._to(exact_dtype(self.dtype))
        n = block_rows(self.out_features, W.dtype)
        for k in range(0, self.in_features, n):
            tokens = torch.arange(k, min(k + n, self.in_features), device=self.device)
            yield "weight", slice(k, k + n), self.to_weight(f(params, W, tokens).t())
            release()

    def probe(self, tokens: int) -> list[tuple[str, Frozen, Tensor, int]]:
        return [("", self._to("meta"), torch.empty(tokens, device="meta").long(), 0)]  # a lookup multiplies nothing

    def to_weight(self, dense: Tensor) -> Tensor:
        scale = self._scale(dense)
        return dense.t() if scale is None else dense.t() / scale


def looked_up(x: Tensor, table: Tensor, padding_idx: int | None, scale_grad_by_freq: bool = False) -> Tensor:
    """Return rows of a table, without a gradient for the padded one. Under `vmap` torch's own forgets that for all members but one."""
    y = F.embedding(x, table, scale_grad_by_freq=scale_grad_by_freq)
    if padding_idx is None:
        return y
    return torch.where((x == padding_idx % len(table))[..., None], y.detach(), y)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if padding_idx is None or max_norm is not None or sparse:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return looked_up(input, weight, padding_idx, scale_grad_by_freq)


LOOKUPS: Functions = {F.embedding: _embedding}
"""Functions for a table that may have a padded row: whoever looks up there gets what `looked_up` returns."""


class _Cast(EmbeddingKind):
    """An embedding in another dtype, of which each lookup is cast, and not the table."""

    def __init__(self, layer: Any, constants: Params, dtype: torch.dtype) -> None:
        super().__init__(layer, constants)
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def weight(self) -> Tensor:
        return self._scaled(self.layer.weight.to(self._dtype)).t()

    def __call__(self, x: Tensor) -> Tensor:
        return self._scaled(self._look_up(x, self.layer.weight).to(self._dtype))


def of_rows_in(module: nn.Module, constants: Params) -> Kind | None:
    """Read a module whose weight holds a row for each token: an embedding or a head. None for others."""
    kind = next((kind for kind in (EmbeddingKind, LinearKind) if kind.fits(module) and kind.faithful(module)), None)
    return None if kind is None else kind(raw(module), constants)
