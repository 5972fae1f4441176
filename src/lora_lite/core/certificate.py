"""A fast approximation of the leading singular triplets of a matrix, with a computed bound on its error.

Let `A` be the matrix, or its transpose where it is taller than wide. A Krylov space in float32 gives `U`. In float64 follow `S` and `V`
with `U^T A = S V^T`, and the residual `R = A V - U S`. Then `X = U S V^T` is the best approximation of rank `r` of `A - R V^T`. For any
bound `t < s_r` of the norm of the rest, `|A - X|_2 <= t`, with Frobenius norms elsewhere:

- The singular subspaces are off by an angle of `sin <= |R| / (s_r - t)`, by Wedin's theorem (1972): by Eckart, Young and Mirsky `t` is at
  least the next singular value.
- The product is off from `A_r`, the best of rank `r`, by `|X - A_r| <= |R| / (1 - t / s_r)`. With the projections `P` on `U` and `Q` on the
  right singular vectors of `A_r`, `X - A_r = P (A - A_r) - (1 - P) A Q`. The first part is at most `t sin_U`, the second
  `|R| + t sin_V`, and they are orthogonal.

Where the gap after the `r`-th is too small for that, let there be a wider one after the `p`-th, `p > r`, and let `U`, `S`, `R` and `t` be
of `p` triplets. In a basis that begins with `U`, `A A^T` is `[[H, B^T], [B, G]]` with `H = S^2`, and `|B| = |R S| = b`.

- By Davis and Kahan (1970) its first `p` eigenvectors are off from `U` by `sin <= b / (s_p^2 - t^2)`. Let `z` be the tangent.
- In a basis of them next to `U`, `A A^T` is similar to `H + B^T Z` with `|Z| <= z`, by `(1 + Z^T Z)^(1/2)`. So it is off from `H` by at
  most `f = (s_1^2 - s_p^2) z^2 / 2 + b z (1 + z^2)^(1/2)`, which is of second order.
- By the same theorem the first `r` of `U` are off by `sin <= z + f / (s_r^2 - s_(r+1)^2 - f)` from those of `A A^T`, up to terms of order
  `z^2` for which a hundredth is added. As `X` and `A_r` are the projections of `A` on both, `|X - A_r| <= 2^(1/2) sin |A|_2`.

Without any gap `|X - A_r| <= 2 |A - X|` still holds.

`t` is computed as well. The triplets after the `r`-th, or the `p`-th, that the space has found are taken out. Of what is left, a Chebyshev
polynomial is applied to 16 Gaussian probes; the largest result bounds its norm, but for a chance of 1e-10 over the probes.
"""

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_lite.core.autocast import full_precision
from lora_lite.core.filtered import filtered
from lora_lite.core.krylov import NARROW, ROUNDING, SMALL, SQUARE, Matrix, Ritz, Square, krylov

TOLERANCE = 1e-3
"""The largest relative error of a fast start: half of what rounding to bfloat16 changes of an entry."""
PROBES, FLOOR = 16, 0.58
"""Probes, and the least length of their part along a direction: `P(chi^2_16 < 0.58^2) <= (x e^(1 - x))^8 < 1e-10`, `x = 0.58^2 / 16`."""
WIDE_ROUNDING = 1e-13
"""A residual, over the norm of the matrix, which float64 leaves."""
DEGREES = 16
"""The most degrees of the polynomial of the probes, two products each."""

LEAST = 1e-30
"""The least norm of a matrix, and the reciprocal of the largest, of which float32 holds the products: others are divided by it first."""


class Start(NamedTuple):
    """The way in which the leading singular triplets of a start were found.

    Attributes:
        path: `"krylov"`, or `"exact"` for the whole decomposition.
        error: bound on the distance of their product from the best approximation of that rank, over its norm; 0 for the exact one.
        angle: bound on the sine of the angle to the true subspaces, `inf` where there is no gap to the next singular value.
    """

    path: Literal["krylov", "exact"]
    error: float
    angle: float


EXACT = Start("exact", 0.0, 0.0)


def certified(
    matrix: Tensor, r: int, tolerance: float = TOLERANCE, angle: float = math.inf
) -> tuple[Start, tuple[Tensor, Tensor, Tensor]] | None:
    """Compute the top `r` singular triplets by the fast path with its bounds, or None where they are not met."""
    with full_precision(matrix):
        return _certified(matrix, r, tolerance, angle)


def frobenius(matrix: Tensor) -> float:
    """Return the norm of a matrix, summed by rows: float32's of a large one at once lacks digits, and a copy in float64 takes long."""
    rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


def _certified(matrix: Tensor, r: int, tolerance: float, angle: float) -> tuple[Start, tuple[Tensor, Tensor, Tensor]] | None:
    norm = frobenius(matrix)
    if not 0 < norm < math.inf:
        return None
    held = LEAST < norm < 1 / LEAST
    narrow = Matrix(matrix.float(), torch.float32, 1 / norm) if held else Matrix((matrix / norm).float(), torch.float32)
    wide = Matrix(matrix, torch.float64)
    for ritz, A in _approximations(narrow, matrix, norm, r, tolerance, angle):
        p = _cut(ritz, r, tolerance, narrow.n)
        rows = ritz.vectors(ritz.apart(p))
        left, S, right, residual = _triplets(wide, rows[:p])
        rest = norm * _rest(A, ritz, rows, p)
        start = _by_gap(S, residual, rest) if p == r else _by_wider_gap(S, residual, rest, r)
        left, S, right = left[:, :r], S[:r], right[:, :r]
        if start.error > tolerance:
            start = start._replace(error=_by_mass(S, matrix))
        if start.error <= tolerance and start.angle <= angle:
            U, V = (right, left) if len(matrix) > matrix.shape[1] else (left, right)
            dtype = torch.promote_types(matrix.dtype, torch.float32)
            signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()  # (1, r)
            return start, ((U * signs).to(dtype).contiguous(), S.to(dtype), (V * signs).t().to(dtype).contiguous())
    return None


def _approximations(
    narrow: Matrix, matrix: Tensor, norm: float, r: int, tolerance: float, angle: float
) -> Iterator[tuple[Ritz, Matrix | Square]]:
    """Approximate the leading vectors, the fastest way first, and for each give what it took products with.

    A way is left out, or ends, where the bounds cannot be met with its digits.
    """

    def provable(ritz: Ritz) -> bool:
        by_gap = _degree(ritz, r, narrow.n) <= DEGREES and ritz.angle(r) <= angle / 3
        return by_gap or (angle == math.inf and ritz.by_mass(r) <= tolerance / 3)

    way = r, matrix.device, tolerance / 3, tolerance / 2, provable
    if narrow.n > max(SQUARE * r, NARROW):
        if ritz := krylov(narrow, *way):
            yield ritz, narrow
        return
    square = narrow.squared()
    if narrow.n > SMALL * r and (ritz := filtered(square, *way)):
        yield ritz, square
    else:
        ritz = square.whole()
        if ritz.error(r, ROUNDING / 2) <= tolerance:
            yield ritz, square
    square = Matrix(matrix.double() / norm, torch.float64).squared()
    ritz = square.whole()
    if ritz.error(r, WIDE_ROUNDING) <= tolerance / 2:
        yield ritz, square


def _cut(ritz: Ritz, r: int, tolerance: float, n: int) -> int:
    """Return the number of triplets after which the gap is to prove the bound: `r` where that is wide enough, by the estimates."""
    if ritz.error(r) <= tolerance / 2 or len(ritz.values) == n:
        return r
    values = ritz.values
    last = len(values) - 1
    missed = [math.sqrt(square) for square in accumulate(residual * residual for residual in ritz.residuals)]
    errors = {
        p: _second_order(values[0], values[p - 1], values[p], values[r - 1] - values[r], missed[p - 1])
        for p in range(r + 1, last)
        if _degree(ritz, p, n) <= DEGREES
    }
    return min(errors, key=lambda p: errors[p], default=r)


def _second_order(first: float, last: float, rest: float, gap: float, missed: float) -> float:
    """Bound the sine between the leading vectors and the true ones by a wider gap after more of them.

    Args:
        first: the first eigenvalue of `A A^T`.
        last: the last one before the wider gap.
        rest: a bound on the next.
        gap: from the last of the leading eigenvalues to the next.
        missed: the norm of the residuals of all vectors before the wider gap.
    """
    sine = missed / (last - rest) if last > rest else 1.0
    if sine > 0.1:
        return math.inf
    tangent = sine / math.sqrt(1 - sine * sine)
    change = (first - last) * tangent**2 / 2 + missed * tangent * math.sqrt(1 + tangent**2) + WIDE_ROUNDING * first
    return 1.01 * (tangent + change / (gap - change)) if gap > change else math.inf


def _triplets(A: Matrix, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `U (n, p)`, `S`, `V (m, p)` in float64 with `U^T A = S V^T`, `U` a basis of the rows' span, and `A V - U S`."""
    Q = torch.linalg.qr(rows.double().t()).Q
    P, triangle = torch.linalg.qr(A.forth(Q.t()).t())  # of the small factor an SVD is quick
    left, S, right = torch.linalg.svd(triangle.t())
    U, V = Q @ left, P @ right.t()
    return U, S, V, A.back(V.t()).t() - U * S


def _by_gap(S: Tensor, residual: Tensor, rest: float) -> Start:
    """Return the bounds by the gap to `rest`, which bounds the norm of the rest. The factors are rounded to float32."""
    missed, size, gap = _norm(residual), _norm(S), float(S[-1]) - rest
    if not gap > 0:
        return Start("krylov", math.inf, math.inf)
    return Start("krylov", missed * float(S[-1]) / gap / size + 3 * 2**-24, missed / gap + 2**-24)


def _by_wider_gap(S: Tensor, residual: Tensor, rest: float, r: int) -> Start:
    """Return the bounds of the first `r` triplets by the gap from the last one to `rest`."""
    values, missed = S.square().tolist(), _norm(residual * S)
    sine = _second_order(values[0], values[-1], rest * rest, values[r - 1] - values[r], missed)
    size, last = _norm(S[:r]), math.sqrt(values[r - 1])
    error = math.sqrt(2 * (values[0] + missed)) * sine
    return Start("krylov", error / size + 3 * 2**-24, max(sine, error / (last - error)) + 2**-24 if error < last else math.inf)


def _norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X))


def _by_mass(S: Tensor, matrix: Tensor) -> float:
    """Return the bound without a gap, by the rest's Frobenius norm: a difference of squares, with the digits of float64."""
    whole = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    found = float(S.square().sum())
    return 2 * math.sqrt((max(whole - found, 0.0) + 1e-14 * whole) / found) + 3 * 2**-24 if found > 0 else math.inf


def _degree(ritz: Ritz, r: int, n: int) -> int:
    """Return the degree by which the polynomial of the probes may leave half of the gap.

    As if it were at most 1 on what is left: its argument is -1 at 0, and 1 at the first eigenvalue that is not taken out.
    """
    outer = _outer(ritz, r)
    aim = (math.sqrt(ritz.values[r - 1]) + math.sqrt(ritz.values[r])) ** 2 / 4
    if not outer < aim:
        return DEGREES + 1
    return math.ceil(math.acosh((math.sqrt(n) + math.sqrt(PROBES)) / FLOOR) / math.acosh(2 * aim / outer - 1))


def _outer(ritz: Ritz, r: int) -> float:
    """Return the first eigenvalue that is not taken out, or the square of the rounding of a matrix of norm 1."""
    return max(ritz.values[ritz.apart(r)], ROUNDING**2)


def _rest(A: Matrix | Square, ritz: Ritz, rows: Tensor, r: int) -> float:
    """Bound the norm of `A - X`, `X` the first `r` triplets. `rows` are the vectors that are known, `(p, n)`.

    Returns:
        The bound, or inf where there is no gap to prove.
    """
    if len(ritz.values) == A.n:
        return math.sqrt(ritz.values[r] + ritz.noise)
    inner, outer, degree = ritz.values[r] * (1 + 1e-5), _outer(ritz, r), _degree(ritz, r, A.n)  # for the digits of float32
    if degree > DEGREES:
        return math.inf

    def left_over(X: Tensor) -> Tensor:
        return X - (X @ rows.t()) @ rows

    before = left_over(torch.randn(PROBES, A.n, generator=torch.Generator().manual_seed(1)).to(rows))
    probes = (2 / outer) * left_over(A.square(before)) - before
    for _ in range(degree - 1):
        before, probes = probes, (4 / outer) * left_over(A.square(probes)) - 2 * probes - before
    size = float(torch.linalg.matrix_norm(probes.double(), 2)) / FLOOR
    beyond = 1.0001 * outer * (1 + math.cosh(math.acosh(max(size, 1.0)) / degree)) / 2
    # The known triplets and what is left, as a matrix of two by two: `R` couples them.
    coupling = sum(residual * residual for residual in ritz.residuals[r : len(rows)])
    return math.sqrt((inner + beyond) / 2 + math.hypot((inner - beyond) / 2, math.sqrt(coupling)) + ritz.noise)
