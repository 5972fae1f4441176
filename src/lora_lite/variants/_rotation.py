"""Rotations from vectors that several variants share: skew matrices from their upper triangles, the Cayley map."""

import torch
from torch import Tensor


def skew(vectors: Tensor, size: int) -> Tensor:
    """Give `(*n, size, size)`: `vectors (*n, size (size - 1) / 2)` above the diagonal, row by row, their negatives below."""
    rows, cols = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(*vectors.shape[:-1], size * size).index_copy(-1, rows * size + cols, vectors)  # out of place, for vmap
    upper = upper.unflatten(-1, (size, size))
    return upper - upper.mT


def cayley_excess(X: Tensor) -> Tensor:
    """Give `C(X) - I = 2 (I - X)^{-1} X`, in at least float32: without the identity, small angles keep their digits."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # I - X is regular for every skew X, so the check for singular ones, for which CUDA would wait, is left out.
    return 2 * torch.linalg.solve_ex(eye - X, X)[0]


def cayley(X: Tensor) -> Tensor:
    """Give the rotation `C(X) = (I - X)^{-1} (I + X)` of a skew `X (*n, k, k)`, in at least float32; `C(-X) = C(X)^T`."""
    excess = cayley_excess(X)
    return excess + torch.eye(X.shape[-1], dtype=excess.dtype, device=X.device)
