"""`Product`: an update `B A` that is never multiplied out, for variants that keep it in this form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen, Params
from lora_lite.layers.kind import Kind, Variant


@dataclass(frozen=True)
class Product:
    """The matrix `B A`, with `B (o, k)` and `A (k, i)` in float64."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's shape, `(o, i)`."""
        return len(self.B), self.A.shape[1]

    @property
    def device(self) -> torch.device:
        """The factors' device."""
        return self.B.device

    def t(self) -> "Product":
        """Return the transpose."""
        return Product(self.A.t(), self.B.t())

    def dense(self) -> Tensor:
        """Return the matrix."""
        return self.B @ self.A

    def detach(self) -> "Product":
        """Return the same matrix without a gradient."""
        return Product(self.B.detach(), self.A.detach())

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.B @ (self.A @ other)

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(Q, C, P)` of which `Q C P` is the matrix, with orthonormal columns of `Q`, rows of `P`, and a small `C`."""
        Q, left = torch.linalg.qr(self.B)
        P, right = torch.linalg.qr(self.A.t())
        return Q, left @ right.t(), P.t()

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float(self.core()[1].norm())


Matrix = Tensor | Product


def dense(t: Matrix) -> Tensor:
    """Return a tensor as it is, and a product multiplied out."""
    return t if isinstance(t, Tensor) else t.dense()


def summed(products: Sequence[Product], weights: Sequence[Any]) -> Product:
    """Return the weighted sum, its factors side by side."""
    return Product(torch.cat([w * p.B for w, p in zip(weights, products)], dim=1), torch.cat([p.A for p in products]))


@torch.no_grad()
def products_of(W: Kind, cfg: AdapterConfig, leaves: Params) -> list[Product] | None:
    """Return the update of each linear map as `scale B A`, where the variant's params are these factors. None where it is another.

    The variant's own function decides: it is applied to a few random vectors. DoRA has such factors too, and another update.
    """
    scale = getattr(cfg, "scale", None)
    plain = type(W).changes is Kind.changes
    if not plain or not isinstance(scale, int | float):
        return None
    found = []
    for part, own in W.pairs(leaves):
        if not {"A", "B"} <= own.keys() or own["A"].dim() != 2 or own["B"].dim() != 2 or len(own["A"]) != own["B"].shape[1]:
            return None
        product = Product(scale * own["B"].double(), own["A"].double())
        if product.shape != (part.out_features, part.in_features) or not _is_update(Variant(cfg), own, part, product):
            return None
        found.append(product)
    return found


def _is_update(f: Variant, own: Params, part: Frozen, product: Product) -> bool:
    W = Frozen(part.dense(torch.float64), None, part.constants)
    probes = torch.randn(4, part.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(W.device)
    before = W.matmul(probes)
    change = f(own, W, probes) - f(own, W, torch.zeros_like(probes[:1])) - before
    missed = change - (product @ probes.t()).t()
    return bool(missed.norm() <= 1e-9 * change.norm() + 1e-13 * before.norm())
