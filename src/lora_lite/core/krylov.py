"""Approximate leading singular vectors, by a block Krylov iteration in float32. `certificate` computes how good they are.

Of a narrow matrix `A` the product `A A^T` is formed once. `filtered` iterates it, or it is decomposed as a whole.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 8, 32
"""The least and the most vectors of a block: small blocks need fewer products in all, large ones fewer of them one after another."""
SQUARE, NARROW = 40, 800
"""Up to so many times the rank, or such a width, `A A^T` is formed: it costs what some ten pairs of products for each of the rank do."""
SMALL = 12
"""Up to so many times the rank all eigenvectors of `A A^T` are as quick as the leading ones."""
STRIPS = 6
"""The strips in which `A A^T` is formed: what lies above their diagonal blocks is that below."""
NOISE = {torch.float32: 2**-22, torch.float64: 2**-48}
"""A bound on what rounding changes of `A A^T`, for an `A` of norm 1: some eight times of what is found."""
WHOLE_NOISE = 16
"""A bound on what rounding changes of its eigenvalues, in such amounts for a largest of 1: some seven times of what is found."""
ALONG = 1e-4
"""The part of a new basis along the old one of which the square is beyond the digits of float32."""
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

    noise = 0.0

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

    def square(self, X: Tensor) -> Tensor:
        """Return `X A A^T` for rows `X (k, n)`."""
        return self.back(self.forth(X))

    def gram(self) -> Tensor:
        """Return `A A^T`, `(n, n)`."""
        width = self.m if self._height == len(self._weight) else max(1, WHOLE // self.n)
        total, *others = (_gram(part.to(self._dtype)) for part in (self._weight.t() if self._tall else self._weight).split(width, 1))
        for other in others:
            total += other
        return total.mul_(self._scale**2)

    def squared(self) -> "Square":
        """Form `A A^T` of an `A` of norm 1."""
        return Square(self.gram())

    def _scaled(self, Y: Tensor) -> Tensor:
        return Y if self._scale == 1.0 else Y.mul_(self._scale)

    def _times(self, X: Tensor) -> Tensor:
        if self._height == len(self._weight):
            return X @ self._weight
        parts = zip(X.split(self._height, 1), self._weight.split(self._height))
        return torch.stack([x @ part.to(self._dtype) for x, part in parts]).sum(0)

    def _times_transposed(self, X: Tensor) -> Tensor:
        if self._height == len(self._weight):
            return X @ self._weight.t()
        return torch.cat([X @ part.to(self._dtype).t() for part in self._weight.split(self._height)], 1)


def _gram(A: Tensor) -> Tensor:
    """Return `A A^T`, with some seven twelfths of the work."""
    n = len(A)
    C, height = A.new_empty(n, n), -(-n // STRIPS)
    for j in range(0, n, height):
        strip = A[j:] @ A[j : j + height].t()
        C[j:, j : j + height] = strip
        C[j : j + height, j + height :] = strip[height:].t()
    return C


class Square:
    """The product `A A^T` of a matrix `A` of norm 1 as `Matrix` is.

    Args:
        product: `(n, n)`.
    """

    def __init__(self, product: Tensor) -> None:
        self.n, self._product, self.noise = len(product), product, NOISE[product.dtype]

    def square(self, X: Tensor) -> Tensor:
        """Return `X A A^T` for rows `X (k, n)`."""
        return X @ self._product

    def chebyshev(self, rows: Tensor, before: Tensor, step: float) -> Tensor:
        """Return the next polynomial of the rows, `2 (step A A^T - 1)` times the last less the one before."""
        return torch.addmm(torch.add(before, rows, alpha=2), rows, self._product, beta=-1, alpha=2 * step)

    def whole(self) -> "Ritz":
        """Return all eigenvectors."""
        values, inner = torch.linalg.eigh(self._product)
        values = values.flip(0).clamp_min(0).tolist()
        return Ritz(inner.flip(1).t(), None, values, [0.0] * self.n, self.noise * (1 + WHOLE_NOISE * values[0]))


class Ritz(NamedTuple):
    """Approximate eigenvectors of `A A^T` in a space, by descending eigenvalue.

    Attributes:
        rows: an orthonormal basis of the space, `(l, n)`.
        inner: the vectors in that basis, `(l, l)`, in float64; None where it is made of them.
        values: eigenvalues, `l` of them.
        residuals: the norms `|A A^T u - value u|`.
        noise: bound on what rounding took from an eigenvalue.
    """

    rows: Tensor
    inner: Tensor | None
    values: list[float]
    residuals: list[float]
    noise: float = 0.0

    def vectors(self, p: int) -> Tensor:
        """Return the first `p` vectors as rows, `(p, n)`, orthonormal up to rounding."""
        return self.rows[:p] if self.inner is None else self.inner[:, :p].t().to(self.rows) @ self.rows

    def error(self, r: int, miss: float | None = None) -> float:
        """Estimate the relative error of the product of the first `r` singular triplets, by their residuals over the gap or by the rest."""
        gap = 1 - math.sqrt(self.values[r] / self.values[r - 1]) if self.values[r - 1] > 0 else 0.0
        return min(self.by_mass(r), (self.miss(r) if miss is None else miss) / gap) if gap > 0 else self.by_mass(r)

    def by_mass(self, r: int) -> float:
        """Estimate that error by the norm of the rest alone, of which the sum of squares has the digits of float32."""
        norm = sum(self.values[:r])
        return 2 * math.sqrt(max(1 - norm - 1e-7, 0.0) / max(norm, 1e-300))

    def miss(self, r: int) -> float:
        """Return the norm of the residuals of the first `r` singular triplets over theirs."""
        squares = sum(residual * residual / value for residual, value in zip(self.residuals[:r], self.values) if value > 0)
        return math.sqrt(squares / max(sum(self.values[:r]), 1e-300))

    def angle(self, r: int) -> float:
        """Estimate the sine of the angle between the spaces of the first `r` vectors and the true ones."""
        gap = math.sqrt(max(self.values[r - 1], 0.0)) - math.sqrt(self.values[r])
        return self.miss(r) * math.sqrt(sum(self.values[:r])) / gap if gap > 0 else math.inf

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
    gram = rows.new_zeros(last, last, dtype=torch.float64)
    start = torch.randn(block, A.n, generator=torch.Generator().manual_seed(0)).to(device)
    next_rows = torch.linalg.qr(A.square(start).t()).Q.t()
    before, done = 1.0, r
    for k in range(0, last, block):
        size = k + block
        rows[k:size] = next_rows
        images[k:size] = newest = A.forth(next_rows)
        gram[k:size, :size] = inner = images[k:size] @ images[:size].t()
        gram[:k, k:size] = inner[:, :k].t()
        next_rows, coupling = _across(rows[:size], A.back(newest), inner)
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


def _across(rows: Tensor, Y: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of what of `Y (b, n)` lies across the rows, `(b, n)`, and the coefficients of that part, `(b, b)`.

    `inner` are the products of `Y` with the rows, `(b, l)`.
    """
    Q, coefficients = torch.linalg.qr((Y - inner.to(Y) @ rows).t())
    along = rows @ Q
    Q = Q - rows.t() @ along
    if float(along.abs().max()) > ALONG:  # where little was left, its rounding is not across
        Q, second = torch.linalg.qr(Q)
        coefficients = second @ coefficients
    return Q.t(), coefficients


def _ritz(rows: Tensor, gram: Tensor, coupling: Tensor) -> Ritz:
    values, inner = torch.linalg.eigh(gram)
    values, inner = values.flip(0).clamp_min(0), inner.flip(1)
    residuals = torch.linalg.vector_norm(coupling.to(inner) @ inner[-len(coupling) :], dim=0)
    return Ritz(rows, inner, values.tolist(), residuals.tolist())


def _columns(since: int, size: int, before: float, error: float, aim: float) -> int:
    """Return how many vectors more bring the error down to `aim`, by the rate of the last ones: it grows, so that they are few."""
    if not error < before:
        return size // 2
    return max(1, min(size, math.ceil(0.8 * math.log(error / aim) * since / math.log(before / error))))
