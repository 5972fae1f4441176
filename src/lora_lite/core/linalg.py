"""Tools for the author of a variant: low-rank products, gates, truncated SVD with fixed signs, uniform draws, rotations.

`add_low_rank`, `gate`, `truncated_svd`, `kaiming` and `cayley` are public, as `lora_lite.linalg`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor

from lora_lite.core.errors import require_type
from lora_lite.core.tracing import beneath_vmap, by_vmap, made_anew


def add_low_rank(y0: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return `y0 + scale h B^T` in one fused multiply-add: `y0 (*b, o)`, `h (*b, r)`, `B (o, r)`."""
    if is_batchedtensor(h) and by_vmap(h):  # the first alone costs a plain call next to nothing
        return beneath_vmap(functools.partial(_add_low_ranks, scale), y0, h, B)
    if y0.dim() == 2:  # views have a price, and one more in the backward pass
        return torch.addmm(y0, h, B.t(), alpha=scale)
    flat = torch.addmm(y0.reshape(-1, y0.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale)
    return flat.view(y0.shape)


def _add_low_ranks(scale: float, y0: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """Return `add_low_rank` of each row of `h`. `y0` and `B` may be shared by all."""
    y0 = y0.expand(h.shape[0], *y0.shape) if y0.dim() < h.dim() else y0
    if B.dim() == 2:
        return add_low_rank(y0, h, B, scale)
    rows = h.shape[0]
    flat = torch.baddbmm(y0.reshape(rows, -1, y0.shape[-1]), h.reshape(rows, -1, h.shape[-1]), B.mT, alpha=scale)
    return flat.view(y0.shape)


def in_blocks(x: Tensor, n: int) -> Tensor:
    """Return `x (*b, n k)` as blocks for `block_product`, `(tokens, n, k)`; long rows on a GPU as `(rows, tokens, n, k)`.

    The gradient of the matrices of `block_product` is one product over all tokens for each block. So few of them leave most of a GPU idle;
    with the rows apart there is one for each row, and their sum.
    """
    k = x.shape[-1] // n
    return x.reshape(*x.shape[:-1], n, k) if x.is_cuda and x.dim() == 3 and x.shape[1] >= 4 * k else x.reshape(-1, n, k)


def block_product(blocks: Tensor, M: Tensor) -> Tensor:
    """Return the product of each block of `in_blocks`, `(*b, n, j)`, with its own matrix of `M (n, j, k)`: `(*b, n, k)`."""
    if blocks.dim() == 3:
        return torch.bmm(blocks.transpose(0, 1), M).transpose(0, 1)
    return (blocks.transpose(1, 2) @ M).transpose(1, 2)


def add_block_product(x: Tensor, M: Tensor) -> Tensor:
    """Return `x (*b, n k)` and the product of each of its blocks with its own matrix of `M (n, k, k)` on top."""
    blocks = in_blocks(x, len(M))
    return (blocks + block_product(blocks, M)).reshape(x.shape)  # the sum lays the blocks out again, so no copy is made for it


def gate(y: Tensor, g: Tensor, fixed: Tensor | None = None) -> Tensor:
    """Return `(1 + g) (y - fixed) + fixed`, with `y (*b, k)` and `g`, `fixed` `(k,)`. The result is exactly `y` where `g = 0`."""
    g, fixed = g.to(y.dtype), None if fixed is None else fixed.to(y.dtype)  # under autocast it has another dtype than the layer's tensors
    if torch.finfo(y.dtype).bits < 32:  # 1 + g would round small gates away
        return torch.addcmul(y, y if fixed is None else y - fixed, g)
    return y * (1 + g) if fixed is None else torch.addcmul(-g * fixed, y, 1 + g)  # one pass each way


def kaiming(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Draw `(rows, cols)` uniformly within 1/sqrt(cols), as `kaiming_uniform_(a=sqrt(5))` does."""
    bound = 1 / math.sqrt(max(cols, 1))  # a layer may have no inputs
    return torch.empty(rows, cols, dtype=torch.float32, device=generator.device).uniform_(-bound, bound, generator=generator)


def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the top `r` of the exact SVD, `U (o, r)`, `S (r)`, `Vh (r, i)`, in at least float32.

    Signs are fixed by the largest entry of each row of `Vh` being positive, so that a recomputed basis is the same one.

    Raises:
        TypeError: where `weight` is no tensor, or `r` no integer.
        ValueError: where `weight` is no matrix, or `r` is negative.
    """
    call = "truncated_svd(weight, r)"
    require_type(isinstance(weight, Tensor), call, "weight", "a matrix", weight)
    require_type(isinstance(r, int) and not isinstance(r, bool), call, "r", "an integer >= 0", r)
    if weight.dim() != 2 or r < 0:
        raise ValueError(f"truncated_svd: expected a matrix and r >= 0, found shape {tuple(weight.shape)} and r={r}. Call {call}.")
    U, S, Vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # (r, 1)
    # Contiguous copies: views would keep the whole decomposition, and a loaded file's layout would give other last digits.
    return (U * signs.t()).contiguous(), S.clone(), (Vh * signs).contiguous()


def smallest_components(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the last `r` of the exact SVD, `U (o, r)`, `S (r)`, `Vh (r, i)`, in at least float32, with the signs of `truncated_svd`."""
    U, S, Vh = truncated_svd(weight, min(weight.shape))
    whole = torch.contiguous_format  # copies: a view would keep all components, and a row of one is contiguous as it lies
    return U[:, -r:].clone(memory_format=whole), S[-r:].clone(), Vh[-r:].clone(memory_format=whole)


def skew(vectors: Tensor, size: int) -> Tensor:
    """Return skew matrices `(*n, size, size)`: `vectors (*n, size (size - 1) / 2)` above the diagonal by rows, their negatives below."""
    zeros = vectors.new_zeros(*vectors.shape[:-1], size * size)
    upper = zeros.index_copy(-1, fixed(_above, size, vectors.device), vectors)  # out of place, for vmap
    upper = upper.view(*vectors.shape[:-1], size, size)
    return upper - upper.mT


def _above(size: int, device: torch.device) -> Tensor:
    rows, cols = torch.triu_indices(size, size, 1, device=device)
    return rows * size + cols


_FIXED: dict[Any, Any] = {}


def fixed(make: Callable[[Any, torch.device], Any], size: Any, device: torch.device) -> Any:
    """Return `make(size, device)`, a tensor or a tuple of them, cached. Where a compiler or a transform traces, they are made anew."""
    if made_anew():
        return make(size, device)
    key = make, size, device
    found = _FIXED.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = make(size, device)
        tensors = found if isinstance(found, tuple) else (found,)
        if any(type(t) is not Tensor or t.is_meta or is_functorch_wrapped_tensor(t) for t in tensors):
            return found
        _FIXED[key] = found
    return found


def once(row: Tensor) -> Tensor:
    """Return a vector as it is. A compiler for a CPU computes it once so, and not again for every row that it is spread over."""
    if not torch.compiler.is_compiling() or row.device.type != "cpu":
        return row
    return torch.zeros_like(row).index_copy(0, torch.arange(len(row), device="cpu"), row)


def cayley_excess(X: Tensor) -> Tensor:
    """Compute `C(X) - I = 2 (I - X)^{-1} X`, in at least float32: without the identity, small angles keep their digits."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # I - X is regular for every skew X, and its condition is that of an angle, so that the inverse loses no digits. torch's solve would do,
    # but forward mode over jacrev inside no_grad takes its factors for constants: wrong numbers without a word.
    return torch.linalg.inv_ex((eye - X) / 2)[0] @ X  # the inverse is kept for its gradient; its double would be kept beside it


def cayley(X: Tensor) -> Tensor:
    """Compute the rotation `C(X) = (I - X)^{-1} (I + X)` of a skew `X (*n, k, k)`, in at least float32. `C(-X) = C(X)^T`."""
    excess = cayley_excess(X)
    return excess + torch.eye(X.shape[-1], dtype=excess.dtype, device=X.device)
