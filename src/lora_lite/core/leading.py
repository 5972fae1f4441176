"""The leading singular triplets of a matrix: a fast approximation with a computed bound on its error, or the exact ones.

Let `A` be the matrix, or its transpose where it is taller than wide. A Krylov space in float32 gives `U`. In float64 follow `S` and `V`
with `U^T A = S V^T`, and the residual `R = A V - U S`. Then `X = U S V^T` is the best approximation of rank `r` of `A - R V^T`. For any
bound `t < s_r` of the norm of the rest, `|A - X|_2 <= t`, with Frobenius norms elsewhere:

- The singular subspaces are off by an angle of `sin <= |R| / (s_r - t)`, by Wedin's theorem (1972): by Eckart, Young and Mirsky `t` is at
  least the next singular value.
- The product is off from `A_r`, the best of rank `r`, by `|X - A_r| <= |R| / (1 - t / s_r)`. With the projections `P` on `U` and `Q` on the
  right singular vectors of `A_r`, `X - A_r = P (A - A_r) - (1 - P) A Q`. The first part is at most `t sin_U`, the second
  `|R| + t sin_V`, and they are orthogonal.

Without a gap `|X - A_r| <= 2 |A - X|` still holds.

`t` is computed as well. The triplets after the `r`-th that the space has found are taken out. Of what is left, a Chebyshev polynomial is
applied to 16 Gaussian probes; the largest result bounds its norm, but for a chance of 1e-10 over the probes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_lite.core.autocast import full_precision
from lora_lite.core.config import AdapterConfig
from lora_lite.core.krylov import ROUNDING, SMALL, SQUARE, Matrix, Ritz, Square, krylov
from lora_lite.core.linalg import truncated_svd

TOLERANCE = 1e-3
"""The largest relative error of a fast start: half of what rounding to bfloat16 changes of an entry."""
ANGLE = 1e-2
"""The largest sine of the angle between a fast start's subspaces and the true ones, where the vectors are used without their values."""
SMALLEST = 160
"""The width from which on the fast path is the faster one."""
PROBES, FLOOR = 16, 0.58
"""Probes, and the least length of their part along a direction: `P(chi^2_16 < 0.58^2) <= (x e^(1 - x))^8 < 1e-10`, `x = 0.58^2 / 16`."""
WIDE_ROUNDING = 1e-13
"""A residual, over the norm of the matrix, which float64 leaves."""
DEGREES = 16
"""The most degrees of the polynomial of the probes, two products each."""

LEAST = 1e-30
"""The least norm of a matrix, and the reciprocal of the largest, of which float32 holds the products: others are divided by it first."""

Way = Literal["auto", "exact"]


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


@dataclass(frozen=True, kw_only=True)
class SVDConfig(AdapterConfig):
    """Base of the configs whose start is made of leading singular vectors.

    Args:
        svd: `"auto"` finds the leading singular vectors by a Krylov iteration where a computed bound shows that they are good enough, and
            by the whole decomposition elsewhere; `"exact"` always by the latter. `adapt.starts` has the bounds.
    """

    svd: Literal["auto", "exact"] = "auto"


EXACT = Start("exact", 0.0, 0.0)

_noted: ContextVar[list[Start] | None] = ContextVar("noted", default=None)


@contextmanager
def noted() -> Iterator[list[Start]]:
    """Collect the starts that are found inside, in a list."""
    starts: list[Start] = []
    token = _noted.set(starts)
    try:
        yield starts
    finally:
        _noted.reset(token)


def note(start: Start) -> None:
    """Add a start to the list of `noted`, where one collects."""
    if (starts := _noted.get()) is not None:
        starts.append(start)


def worst(starts: list[Start]) -> Start:
    """Return the path and the bounds that hold for all of several starts."""
    path: Literal["krylov", "exact"] = "krylov" if any(start.path == "krylov" for start in starts) else "exact"
    return Start(path, max(start.error for start in starts), max(start.angle for start in starts))


def leading_svd(
    matrix: Tensor, r: int, svd: Way = "auto", *, tolerance: float = TOLERANCE, angle: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the top `r` singular triplets, `U (o, r)`, `S (r)`, `Vh (r, i)`, in at least float32, with the signs of `truncated_svd`.

    Args:
        matrix: `(o, i)`.
        r: number of triplets.
        svd: `"auto"` takes the fast path where its computed bounds are met, and else the whole decomposition; `"exact"` the latter.
        tolerance: the largest relative error of the product `U S Vh`.
        angle: the largest sine of the angle to the true subspaces, for a use of the vectors without their values.
    """
    found = None
    if svd == "auto" and not matrix.is_meta and min(matrix.shape) >= max(SMALLEST, 4 * r):
        found = certified(matrix.cpu() if matrix.device.type == "mps" else matrix, r, tolerance, angle)  # mps has no float64
    start, (U, S, Vh) = found or (EXACT, truncated_svd(matrix, r))
    note(start)
    return U.to(matrix.device), S.to(matrix.device), Vh.to(matrix.device)


def leading_eigenpairs(C: Tensor, k: int, svd: Way = "auto") -> tuple[Tensor, Tensor, Start]:
    """Compute the largest `k` eigenvalues `(k,)`, descending, and eigenvectors `(n, k)` of a positive semidefinite `C (n, n)`.

    Returns:
        Both, and how they were found: they may serve several layers. The fast path is for a sine of at most 1e-3, a cosine within 5e-7.
    """
    found = certified(C, k, angle=1e-3) if svd == "auto" and len(C) >= max(SMALLEST, 4 * k) else None
    if found is not None:
        start, (_, values, rows) = found
        return values, rows.t(), start
    values, vectors = torch.linalg.eigh(C)
    return values.flip(0)[:k], vectors.flip(1)[:, :k], EXACT


def balanced_factors(weight: Tensor, r: int, scale: float = 1.0, svd: Way = "exact") -> tuple[Tensor, Tensor]:
    """Compute `A (r, i)` and `B (o, r)` of which `scale B A` is the best rank-`r` approximation, with the roots of `S / scale` in each.

    In at least float32, with the signs of `truncated_svd`.
    """
    U, S, Vh = leading_svd(weight, r, svd)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


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
    for ritz, A in _approximations(narrow, matrix, norm, r, tolerance):
        rows = ritz.vectors(ritz.apart(r))
        left, S, right, residual = _triplets(wide, rows[:r])
        start = _by_gap(S, residual, norm * _rest(A, ritz, rows, r))
        if start.error > tolerance:
            start = start._replace(error=_by_mass(S, matrix))
        if start.error <= tolerance and start.angle <= angle:
            U, V = (right, left) if len(matrix) > matrix.shape[1] else (left, right)
            dtype = torch.promote_types(matrix.dtype, torch.float32)
            signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()  # (1, r)
            return start, ((U * signs).to(dtype).contiguous(), S.to(dtype), (V * signs).t().to(dtype).contiguous())
    return None


def _approximations(narrow: Matrix, matrix: Tensor, norm: float, r: int, tolerance: float) -> Iterator[tuple[Ritz, Matrix | Square]]:
    """Approximate the leading vectors, the fastest way first, and for each give what it took products with.

    A way is left out, or ends, where the bounds cannot be met with its digits.
    """

    def provable(ritz: Ritz) -> bool:
        return ritz.by_mass(r) <= tolerance / 3 or _degree(ritz, r, narrow.n) <= DEGREES

    def by(A: Matrix | Square) -> Ritz | None:
        return krylov(A, r, matrix.device, tolerance / 3, tolerance / 2, provable)

    if narrow.n > SQUARE * r:
        if ritz := by(narrow):
            yield ritz, narrow
        return
    square = narrow.squared()
    if narrow.n > SMALL * r and (ritz := by(square)):
        yield ritz, square
    else:
        ritz = square.whole()
        if ritz.error(r, ROUNDING / 2) <= tolerance:
            yield ritz, square
    square = Matrix(matrix.double() / norm, torch.float64).squared()
    ritz = square.whole()
    if ritz.error(r, WIDE_ROUNDING) <= tolerance / 2:
        yield ritz, square


def _triplets(A: Matrix, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Compute `U (n, r)`, `S`, `V (m, r)` in float64 with `U^T A = S V^T`, `U` a basis of the rows' span, and `|A V - U S|`."""
    Q = torch.linalg.qr(rows.double().t()).Q
    P, triangle = torch.linalg.qr(A.forth(Q.t()).t())  # of the small factor an SVD is quick
    left, S, right = torch.linalg.svd(triangle.t())
    U, V = Q @ left, P @ right.t()
    return U, S, V, float(torch.linalg.vector_norm(A.back(V.t()) - (U * S).t()))


def _by_gap(S: Tensor, residual: float, rest: float) -> Start:
    """Return the bounds by the gap to `rest`, which bounds the norm of the rest. The factors are rounded to float32."""
    size, gap = float(torch.linalg.vector_norm(S)), float(S[-1]) - rest
    if not gap > 0:
        return Start("krylov", math.inf, math.inf)
    return Start("krylov", residual * float(S[-1]) / gap / size + 3 * 2**-24, residual / gap + 2**-24)


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
    if ritz.rows is None:
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
