"""Approximate leading singular vectors, by a block Krylov iteration in float32. How good they are, `leading` computes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 8, 32
"""The least and the most vectors of a block: small blocks need fewer products in all, large ones fewer of them one after another."""
ROUNDING = 1e-6
"""A residual, over the norm of the matrix, below which float32 makes no progress."""
WHOLE = 2**24
"""The most entries of a weight that are turned into float64 at once."""


class Matrix:
    """A matrix `A (n, m)` with `n <= m`, a weight or its transpose, whose products take the order that is fast.

    Args:
        weight: `(o, i)`, of any floating dtype; it is not copied where it is large and of another dtype than `dtype`.
        dtype: of the products.
        scale: `A` is so many times the weight: the products are scaled, which are smaller than it.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.n, self.m = sorted(weight.shape)
        self._tall, self._dtype, self._scale = len(weight) > weight.shape[1], dtype, scale
        self._height = len(weight) if weight.dtype is dtype or weight.numel() <= WHOLE else max(1, WHOLE // weight.shape[1])
        self._weight = weight.to(dtype) if self._height == len(weight) else weight

    def forth(self, X: Tensor) -> Tensor:
        """Return `X A` for rows `X (k, n)`."""
        return self._scaled(self._times_transposed(X) if self._tall else self._times(X))

    def back(self, X: Tensor) -> Tensor:
        """Return `X A^T` for rows `X (k, m)`."""
        return self._scaled(self._times(X) if self._tall else self._times_transposed(X))

    def _scaled(self, Y: Tensor) -> Tensor:
        return Y if self._scale == 1.0 else Y.mul_(self._scale)

    def _times(self, X: Tensor) -> Tensor:
        if self._height == len(self._weight):
            return X @ self._weight
        parts = zip(X.split(self._height, 1), self._weight.split(self._height))
        return torch.stack([x @ part.to(self._dtype) for x, part in parts]).sum(0)

    def _times_transposed(self, X: Tensor) -> Tensor:
        if self._height == len(self._weight):
            return (self._weight @ X.t()).t()
        return torch.cat([part.to(self._dtype) @ X.t() for part in self._weight.split(self._height)]).t()


class Ritz(NamedTuple):
    """Approximate eigenvectors of `A A^T` in a Krylov space, by descending eigenvalue.

    Attributes:
        rows: the basis of the space, `(l, n)`, in float32.
        inner: the vectors in that basis, `(l, l)`, in float64.
        values: eigenvalues, `l` of them.
        residuals: the norms `|A A^T u - value u|`, by the recurrence.
    """

    rows: Tensor
    inner: Tensor
    values: list[float]
    residuals: list[float]

    def vectors(self, p: int) -> Tensor:
        """Return the first `p` vectors as rows, `(p, n)`, orthonormal up to rounding."""
        return self.inner[:, :p].t().to(self.rows) @ self.rows

    def error(self, r: int) -> float:
        """Estimate the relative error of the product of the first `r` singular triplets, by their residuals over the gap or by the rest."""
        gap = 1 - math.sqrt(self.values[r] / self.values[r - 1]) if self.values[r - 1] > 0 else 0.0
        return min(self.by_mass(r), self.miss(r) / gap) if gap > 0 else self.by_mass(r)

    def by_mass(self, r: int) -> float:
        """Estimate that error by the norm of the rest alone, of which the sum of squares has the digits of float32."""
        norm = sum(self.values[:r])
        return 2 * math.sqrt(max(1 - norm - 1e-7, 0.0) / max(norm, 1e-300))

    def miss(self, r: int) -> float:
        """Return the norm of the residuals of the first `r` singular triplets over theirs."""
        squares = sum(residual * residual / value for residual, value in zip(self.residuals[:r], self.values) if value > 0)
        return math.sqrt(squares / max(sum(self.values[:r]), 1e-300))

    def apart(self, r: int) -> int:
        """Return how many triplets to take out of the rest: as many after the `r`-th as are known well beside the gap."""
        values, squares, gap = self.values, 0.0, self.values[r - 1] - self.values[r]
        for p in range(r + 1, len(values)):
            squares += self.residuals[p - 1] ** 2
            if squares > max(0.02 * gap * (values[r] - values[p]), (0.1 * gap) ** 2):
                return p - 1
        return len(values) - 1


def krylov(A: Matrix, r: int, device: torch.device, aim: float, most: float, provable: Callable[[Ritz], bool]) -> Ritz | None:
    """Approximate the first `r` left singular vectors of `A`, of norm 1 and in float32, until the error is at most `aim` and can be proved.

    The start is drawn on the CPU from a generator of its own, so that it does not depend on the device.

    Returns:
        The approximation; None where rounding, or a space of three fifths of the dimensions, leaves an estimated error above `most`. A
        third of them leaves one above 0.3 where the spectrum is flat and the width small: the whole decomposition is then as fast.
    """
    block = min(max(r, BLOCK[0]), BLOCK[1])
    last = min(A.n * 3 // 5, 40 * r + 256) // block * block
    check = (3 * r // block + 1) * block
    if last < check:
        return None
    rows = torch.empty(last, A.n, device=device)
    images = torch.empty(last, A.m, device=device, dtype=torch.float64)
    gram = images.new_empty(last, last)
    start = torch.randn(block, A.n, generator=torch.Generator().manual_seed(0)).to(device)
    next_rows = torch.linalg.qr(A.back(A.forth(start)).t()).Q.t()
    before, done = math.inf, 0
    for k in range(0, last, block):
        size = k + block
        rows[k:size] = next_rows
        newest = A.forth(rows[k:size])
        images[k:size] = newest
        gram[k:size, :size] = images[k:size] @ images[:size].t()
        gram[:k, k:size] = gram[k:size, :k].t()
        next_rows, coupling = _across(rows[:size], A.back(newest))
        if size < check:
            continue
        ritz = _ritz(rows[:size], gram[:size, :size], coupling)
        error = ritz.error(r)
        if error <= aim and provable(ritz):
            return ritz
        if size == last or ritz.miss(r) < ROUNDING or (3 * size >= A.n and error > 0.3):  # no sign of convergence
            return ritz if error <= most else None
        more = _columns(size - done, size, before, error, aim)
        before, done, check = error, size, min(size + -(-more // block) * block, last)
    raise AssertionError("the last block returns")


def _across(rows: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of what of `Y (b, n)` lies across the rows, `(b, n)`, and the coefficients of that part, `(b, b)`."""
    Q, first = torch.linalg.qr((Y - (Y @ rows.t()) @ rows).t())
    Q, second = torch.linalg.qr(Q - rows.t() @ (rows @ Q))  # where little was left, its rounding is not across
    return Q.t(), second @ first


def _ritz(rows: Tensor, gram: Tensor, coupling: Tensor) -> Ritz:
    values, inner = torch.linalg.eigh(gram)
    values, inner = values.flip(0).clamp_min(0), inner.flip(1)
    residuals = torch.linalg.vector_norm(coupling.to(inner) @ inner[-len(coupling) :], dim=0)
    return Ritz(rows, inner, values.tolist(), residuals.tolist())


def _columns(since: int, size: int, before: float, error: float, aim: float) -> int:
    """Return how many vectors more bring the error down to `aim`, by the rate of the last ones: it grows, so that they are few."""
    if not error < before < math.inf:
        return size // 2
    return max(1, min(size // 2, math.ceil(0.8 * math.log(error / aim) * since / math.log(before / error))))
