"""Approximate leading eigenvectors of a matrix that is at hand, by a subspace iteration with Chebyshev filters.

A polynomial of the matrix is small on all eigenvalues below those that the space has found, and grows fastest above. The space stays small,
so that little time is spent on its basis. Source: Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations using
Chebyshev-filtered subspace iteration" (2006).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_lite.core.krylov import ROUNDING, Ritz, Square

MORE = 8, 32
"""The least and the most vectors of the space beyond those that are wanted, as many as which there are otherwise."""
START = 3
"""Products before the first look at the space."""
RANGE = 1e6
"""By how much more a polynomial may grow at the largest eigenvalue than at the least of the space, of the digits of float32."""
MOST = 8
"""The most products, as a part of the width: all of them take some half of the time of the whole decomposition."""


def filtered(A: Square, r: int, device: torch.device, aim: float, most: float, provable: Callable[[Ritz], bool]) -> Ritz | None:
    """Approximate the first `r` eigenvectors of `A`, in float32, until the error is at most `aim` and can be proved.

    The start is drawn on the CPU from a generator of its own, so that it does not depend on the device.

    Returns:
        The approximation; None where the iteration has not come to its end and leaves an estimated error above `most`.
    """
    size = min(r + min(max(r, MORE[0]), MORE[1]), A.n)
    rows = torch.randn(size, A.n, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(START):
        rows = _basis(A.square(rows))
    products = START
    while True:
        images = A.square(rows)
        values, inner = torch.linalg.eigh(images @ rows.t())
        values, turn = values.flip(0).clamp_min(0), inner.flip(1).t()
        rows, images = turn @ rows, turn @ images
        residuals = torch.linalg.vector_norm(torch.addcmul(images, values[:, None], rows, value=-1), dim=1)
        ritz = Ritz(rows, None, values.tolist(), residuals.tolist(), A.noise)
        error = ritz.error(r)
        # Below their rounding the residuals tell no more. How good the vectors are, the bound will tell.
        if (error <= aim or ritz.miss(r) < ROUNDING) and provable(ritz):
            return ritz
        if products > A.n // MOST:
            return ritz if error <= most else None
        degree = _degree(ritz, r, error / aim)
        products += degree
        step = 2 / max(ritz.values[-1], 1e-30)
        if degree > 1:
            before, rows = rows, torch.sub(step * images, rows)
            for _ in range(degree - 1):
                before, rows = rows, A.chebyshev(rows, before, step)
        rows = _basis(rows if degree > 1 else images)


def _basis(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows' span."""
    return torch.linalg.qr(rows.t()).Q.t()


def _degree(ritz: Ritz, r: int, excess: float) -> int:
    """Return the degree of the next polynomial, which brings the error to the aim, or uses the digits of float32."""
    top, wanted, bottom = ritz.values[0], ritz.values[r - 1], max(ritz.values[-1], 1e-30)

    def growth(value: float) -> float:
        return max(math.acosh(max(2 * value / bottom - 1, 1.0)), 1e-3)

    needed = math.log(2 * max(excess, 2.0)) / growth(wanted)
    return max(1, min(math.floor(math.log(2 * RANGE) / growth(top)), math.ceil(needed)))
