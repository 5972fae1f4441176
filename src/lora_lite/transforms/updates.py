"""The update of one target as tensors by name in float64, what is lost of it, and its low-rank factors."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Params
from lora_lite.core.linalg import truncated_svd
from lora_lite.layers.identity import at_identity
from lora_lite.layers.kind import Kind, Variant
from lora_lite.transforms.product import Matrix, Product, dense, products_of, summed

Update = dict[str, Matrix]
"""The change of the `weight` and the `bias` of each linear map, under `weight.0`, `bias.0`, ..., or of a module's parameters by name."""

TAIL = 1e-9
"""The part of an update's norm that its factors may leave out: far below float32, above the rounding of an evaluation in float64."""


@torch.no_grad()
def update_of(W: Kind, cfg: AdapterConfig, leaves: Params) -> dict[str, Tensor]:
    """Return the update that a variant with these params makes at a layer.

    Raises:
        ValueError: where a kind cannot tell.
    """
    moved = W.displacements(Variant(cfg), leaves)
    if moved is not None:
        return {name: delta.double() for name, delta in moved.items()}
    changes = W.changes(Variant(cfg), leaves)
    return {f"{role}.{n}": t for n, pair in enumerate(changes) for role, t in zip(("weight", "bias"), pair)}


@torch.no_grad()
def factored_update_of(W: Kind, cfg: AdapterConfig, leaves: Params) -> Update:
    """Return the same with weights as products, where the variant keeps them so. No matrix of a layer's size is then multiplied out."""
    products = None if cfg.adapts != "linear" else products_of(W, cfg, leaves)
    if products is None:
        return dict(update_of(W, cfg, leaves))
    found: Update = {}
    for n, ((part, own), product) in enumerate(zip(W.pairs(leaves), products)):
        bias = at_identity(Variant(cfg), own, part, "bias", torch.float64)
        found |= {f"weight.{n}": product, f"bias.{n}": bias if part.bias is None else bias - part.bias.detach().double()}
    return found


def norm(parts: Iterable[Matrix]) -> float:
    """Return the Frobenius norm of several tensors together."""
    return math.hypot(*(float(part.norm()) for part in parts))


@torch.no_grad()
def lost(held: Mapping[str, Matrix], wanted: Mapping[str, Matrix], terms: float = 0.0) -> float:
    """Return the norm of what an update misses of another, over the norm of the other; 0 where both are nothing.

    `terms` is the size of what the other was summed of. Where that cancels, the sum is rounding, and `terms` is the measure.
    """
    missed = norm(_difference(held[name].detach(), t.detach()) for name, t in wanted.items())
    size = norm(t.detach() for t in wanted.values())
    return missed / max(size if size > TAIL * terms else terms, torch.finfo(torch.float64).tiny)


def _difference(held: Matrix, wanted: Matrix) -> Matrix:
    if isinstance(held, Product) and isinstance(wanted, Product):
        return summed([held, wanted], [1.0, -1.0])
    return dense(held).double() - dense(wanted).double()


def decomposed(delta: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SVD `U (o, k)`, `S (k)`, `Vh (k, i)` of an update, `k` its numerical rank: what is left out is below `TAIL`.

    An update of low rank is found by its products with a few random vectors. Whether these were enough is checked.
    """
    size = norm([delta])
    if isinstance(delta, Product):
        Q, core, P = delta.core()
        U, S, Vh = truncated_svd(core, min(core.shape))
        U, Vh = Q @ U, Vh @ P
    else:
        U, S, Vh = _sketched(delta, size) or truncated_svd(delta, min(delta.shape))
    tails = S.flip(0).square().cumsum(0).sqrt().flip(0)
    k = int((tails > TAIL * size).sum())
    return U[:, :k], S[:k], Vh[:k]


def _sketched(delta: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor] | None:
    for k in (64, 256):
        if 4 * k > min(delta.shape):
            break
        probes = torch.randn(delta.shape[1], k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        Q = torch.linalg.qr(delta @ probes.to(delta)).Q
        core = Q.t() @ delta
        if norm([delta - Q @ core]) <= TAIL * size:
            U, S, Vh = truncated_svd(core, k)
            return Q @ U, S, Vh
    return None


def side_by_side(deltas: Sequence[Matrix], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return `A (k, i)` and `B (o, k)` of a weighted sum, the factors of each update below and beside those of the others."""
    parts = [decomposed(delta) for delta in deltas]
    A = torch.cat([S.sqrt()[:, None] * Vh for _, S, Vh in parts])
    return A, torch.cat([w * (U * S.sqrt()) for w, (U, S, _) in zip(weights, parts)], dim=1)


def on_one_basis(deltas: Sequence[Matrix], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return `A (k, i)` and `B (o, k)` of a weighted sum: one is a basis of all updates, and the other is linear in the weights."""
    o, i = deltas[0].shape
    if o < i:
        B, A = on_one_basis([delta.t() for delta in deltas], weights)
        return A.t(), B.t()
    rows = torch.cat([decomposed(delta)[2] for delta in deltas])
    A = decomposed(rows)[2]
    return A, sum((w * (delta @ A.t()) for w, delta in zip(weights, deltas)), rows.new_zeros(o, len(A)))


def best_of_rank(delta: Matrix, r: int) -> tuple[Tensor, Tensor]:
    """Return `A (k, i)` and `B (o, k)` of the best approximation of rank `r`; `k` is less where the update has less."""
    U, S, Vh = (part[..., :r] if n < 2 else part[:r] for n, part in enumerate(decomposed(delta)))
    return S.sqrt()[:, None] * Vh, U * S.sqrt()


def widened(A: Tensor, B: Tensor, r: int) -> Mapping[str, Tensor]:
    """Return the factors at rank `r`, by zeros."""
    more = r - len(A)
    return {"A": torch.cat([A, A.new_zeros(more, A.shape[1])]), "B": torch.cat([B, B.new_zeros(len(B), more)], dim=1)}
