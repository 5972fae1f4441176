"""Mathematics that several variants share: low-rank products, truncated SVD with fixed signs, uniform draws."""

import math

import torch
from torch import Tensor


def add_low_rank(y0: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Give `y0 + scale h B^T` in one fused multiply-add: `y0 (*b, o)`, `h (*b, r)`, `B (o, r)`."""
    flat = torch.addmm(y0.reshape(-1, y0.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale)
    return flat.view(y0.shape)


def gate(y: Tensor, g: Tensor, fixed: Tensor | None = None) -> Tensor:
    """Give `(1 + g) (y - fixed) + fixed`, with `y (*b, k)` and `g`, `fixed` `(k,)`; `y` to the bit where `g = 0`."""
    g = g.to(y.dtype)  # under autocast the layer's output has another dtype than its input
    if torch.finfo(y.dtype).bits < 32:  # 1 + g would round small gates away
        return torch.addcmul(y, y if fixed is None else y - fixed, g)
    return y * (1 + g) if fixed is None else torch.addcmul(-g * fixed, y, 1 + g)  # one pass each way


def kaiming(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Draw `(rows, cols)` uniformly within 1/sqrt(cols), as `kaiming_uniform_(a=sqrt(5))` does."""
    bound = 1 / math.sqrt(cols)
    return torch.empty(rows, cols, dtype=torch.float32, device=generator.device).uniform_(-bound, bound, generator=generator)


def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the top `r` of the exact SVD, `U (o, r)`, `S (r)`, `Vh (r, i)`, in at least float32.

    Signs are fixed by the largest entry of each row of `Vh` being positive, so that a recomputed basis is the same one.
    """
    U, S, Vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # (r, 1)
    # Contiguous copies: views would keep the whole decomposition, and a loaded file's layout would give other last digits.
    return (U * signs.t()).contiguous(), S.clone(), (Vh * signs).contiguous()


def full_precision(x: Tensor) -> torch.autocast:
    """Give a context in which autocast leaves the dtypes of small products and solves alone."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # autocast knows no meta device
