"""The leading singular triplets of a matrix: a fast approximation with a computed bound on its error, or the exact ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_lite.core.certificate import EXACT, TOLERANCE, Start, certified
from lora_lite.core.config import AdapterConfig
from lora_lite.core.linalg import truncated_svd
from lora_lite.core.tracing import valueless

ANGLE = 1e-2
"""The largest sine of the angle between a fast start's subspaces and the true ones, where the vectors are used without their values."""
SMALLEST = 160
"""The width from which on the fast path is the faster one."""

Way = Literal["auto", "exact"]


@dataclass(frozen=True, kw_only=True)
class SVDConfig(AdapterConfig):
    """Base of the configs whose start is made of leading singular vectors.

    Args:
        svd: `"auto"` finds the leading singular vectors by a Krylov iteration where a computed bound shows that they are good enough, and
            by the whole decomposition elsewhere; `"exact"` always by the latter. `adapt.starts` has the bounds.
    """

    svd: Literal["auto", "exact"] = "auto"


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
    if svd == "auto" and not valueless(matrix) and min(matrix.shape) >= max(SMALLEST, 4 * r):
        found = certified(matrix.cpu() if matrix.device.type == "mps" else matrix, r, tolerance, angle)  # mps has no float64
    start, (U, S, Vh) = found or (EXACT, truncated_svd(matrix, r))
    note(start)
    return U.to(matrix.device), S.to(matrix.device), Vh.to(matrix.device)


def leading_eigenpairs(C: Tensor, k: int, svd: Way = "auto") -> tuple[Tensor, Tensor, Start]:
    """Compute the largest `k` eigenvalues `(k,)`, descending, and eigenvectors `(n, k)` of a positive semidefinite `C (n, n)`.

    Returns:
        Both, and how they were found: they may serve several layers. The fast path is for a sine of at most 1e-3, a cosine within 5e-7.
    """
    found = certified(C, k, angle=1e-3) if svd == "auto" and not valueless(C) and len(C) >= max(SMALLEST, 4 * k) else None
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
