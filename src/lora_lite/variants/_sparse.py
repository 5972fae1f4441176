"""Updates that are few numbers at drawn places of the weight: the places, as PEFT draws them, and the products."""

import functools
from typing import Any

import torch
from torch import Tensor

from lora_lite.core import Constants, Frozen, expect
from lora_lite.core.tracing import made_anew

DENSE = 512
"""Largest number of entries of a weight for each one that is updated, with which a dense update is the cheaper one, by measurement."""


def places(o: int, i: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` different places of an `(o, i)` weight, as places of the weight laid out flat."""
    flat = torch.randperm(o * i, generator=generator, device="cpu")[:count].clone()  # a view would keep the whole permutation
    return narrow(flat, o * i)


def narrow(places: Tensor, size: int) -> Tensor:
    """Return places of a weight of so many entries in the smallest dtype of indices that has room for them."""
    return places.to(torch.int32) if size <= torch.iinfo(torch.int32).max else places


def seeded_places(o: int, i: int, count: int, seed: int) -> Tensor:
    """Return the places that `seed` gives. Layers of one shape have the same, and the permutation of a large weight takes a second."""
    return places(o, i, count, torch.Generator().manual_seed(seed))


_cached_places = functools.lru_cache(maxsize=64)(seeded_places)


def drawn_places(cfg: Any, W: Frozen) -> Constants:
    """Return the constant `places` of a config with the fields `n_frequency` and `seed`."""
    o, i = W.out_features, W.in_features
    expect(cfg, "n_frequency", cfg.n_frequency <= i * o, f"at most i o = {i * o}", "Lower n_frequency or leave the layer out.")
    draw = seeded_places if made_anew() else _cached_places
    return {"places": draw(o, i, cfg.n_frequency, cfg.seed).clone()}


def places_of(W: Frozen, count: int, seed: int) -> Tensor:
    """Return the places among a layer's constants, or for a plain weight those that `seed` gives."""
    if W.constants:
        return W.constants["places"]
    return seeded_places(W.out_features, W.in_features, count, seed).to(W.device)


def is_dense(count: int, W: Frozen) -> bool:
    """Whether so many updated entries of a weight are cheaper as a dense update than one by one."""
    return W.in_features * W.out_features <= DENSE * count


def plus_sparse(W: Frozen, x: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> Tensor:
    """Return `W(x) + S x`, where `values (k,)` are added up at `rows` and `cols` `(k,)` of an empty `S (o, i)`."""
    o, i = W.out_features, W.in_features
    if is_dense(values.shape[0], W):
        return W.updated_at(x, rows.long() * i + cols, values)
    y = W(x)
    return y + gathered(x, rows, cols, values, o).to(y.dtype)


def gathered(x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, o: int) -> Tensor:
    """Return `S x` entry by entry, in the dtype of `x` or in float32 at least."""
    terms = x.index_select(-1, cols) * values
    exact = torch.promote_types(x.dtype, torch.float32)  # many small terms for each output
    return x.new_zeros(*x.shape[:-1], o, dtype=exact).index_add(-1, rows, terms.to(exact))


def plus_flat(W: Frozen, x: Tensor, flat: Tensor, values: Tensor) -> Tensor:
    """Return `W(x) + S x`, where `values (k,)` are added up at the places `flat (k,)` of an empty `S (o, i)` laid out flat."""
    if not is_dense(values.shape[0], W):
        return plus_sparse(W, x, flat // W.in_features, flat % W.in_features, values)
    return W.updated_at(x, flat.long(), values)  # narrower ones are read at half the speed, twice in a step
