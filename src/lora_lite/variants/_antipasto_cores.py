"""The cores of AntiPaSTO: pure functions on the weight's frozen factors. `antipasto.py` has the formulas and the config.

A basis `U (o, r)`, `S (r)`, `Vh (r, i)` is in the constants of `W`, or the top of its SVD where there are none. `p = Vh x` is a
token's coordinates; a core takes the place of `S p`, and only its difference from `S p` is computed. Small matrices are built once
per forward, in at least float32, and act on `p`: on the bases they would cost the wider side of the layer, and a gradient as large.
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Constants, Frozen, Params, add_low_rank, block_product, cayley_excess, checked, in_blocks, skew
from lora_lite.variants.ssvd import singular_triplets


def _basis(W: Frozen, r: int) -> Constants:
    return dict(W.constants) or singular_triplets(W, r)


def _coordinates(basis: Params, x: Tensor) -> Tensor:
    return F.linear(x, basis["Vh"].to(x.dtype))  # p = Vh x, (*b, r)


def _add(W: Frozen, x: Tensor, basis: Params, h: Tensor) -> Tensor:
    return add_low_rank(W(x), h, basis["U"].to(x.dtype))  # W x + b + U h


def _gains(basis: Params, g: Tensor, x: Tensor) -> Tensor:
    """Compute `S ELU(g)`: `S` times 1 + it is positive whatever `g`, at most `S` for `g <= 0`."""
    S = basis["S"][-g.shape[0] :]  # the arrow has gains for the tail alone
    return (S * F.elu(g.to(S.dtype))).to(x.dtype)


def _sizes(t: Tensor, bound: float, clamp: str) -> Tensor:
    """Measure `z = |A| / a` of `A = skew(t / 2)`: by entry, or one for a block that bounds its spectral norm.

    A skew matrix has each singular value twice, so its Frobenius norm over sqrt(2), which is the norm of the vector, is at least the
    largest: equal to it for blocks of 2 and 3.
    """
    z = t / (2 * bound)
    if clamp == "spectral":  # away from zero, where the root has no derivative, by less than the dtype resolves
        z = z.square().sum(-1, keepdim=True).clamp_min(torch.finfo(t.dtype).eps).sqrt()
    return z


def clamped(t: Tensor, max_angle: float, clamp: str) -> Tensor:
    """Bound the vectors of `A = skew(t / 2)` smoothly by `a = 2 tan(max_angle / 2)`: `a tanh(A / a)`, or `A a tanh(n / a) / n`."""
    bound = 2 * math.tan(max_angle / 2)
    z = _sizes(t, bound, clamp)
    return bound * z.tanh() if clamp == "element" else t / 2 * (z.tanh() / z)


def scaled(t: Tensor, c: float | Tensor, max_angle: float, clamp: str) -> Tensor:
    """Compute the `t` whose clamped `A` is `c` times that of `t`: exact while `c A` respects the bound, held at it beyond."""
    full = t.to(torch.promote_types(t.dtype, torch.float32))
    bound = 2 * math.tan(max_angle / 2)
    z = _sizes(full, bound, clamp)
    edge = 1 - torch.finfo(full.dtype).eps  # tanh rounds to 1 for large t, where its inverse is infinite
    wanted = (c * z.tanh()).clamp(-edge, edge).atanh()
    return (2 * bound * wanted if clamp == "element" else full * (wanted / z)).to(t.dtype)


class RotationParams(TypedDict):
    delta_s: Float[Tensor, " r"]
    t: Float[Tensor, "*sides n pairs"]


@checked
def antipasto_rotation(
    params: RotationParams, W: Frozen, x: Float[Tensor, "*b i"], *, rotate_basis: str, max_rotation_angle: float, angle_clamp: str
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U [R_u^T (S + delta_s) R_v p - S p]`. `t` is `(n, pairs)`, for both sides `(2, n, pairs)`, V first."""
    basis = _basis(W, params["delta_s"].shape[0])
    t = params["t"].to(basis["S"].dtype)
    n = t.shape[-2]
    S, shift = (rearrange(v, "(n k) -> n k", n=n) for v in (basis["S"], params["delta_s"].to(t.dtype)))
    # R - 1 of every block: with a core made of increments nothing as large as S p cancels in low precision.
    excess = cayley_excess(skew(clamped(t, max_rotation_angle, angle_clamp) / 2, S.shape[-1]))  # (*sides, n, k, k)
    of_v, of_u = {"V": (excess, None), "U": (None, excess)}[rotate_basis] if rotate_basis != "both" else excess.unbind(0)
    core = torch.diag_embed(shift)
    if of_v is not None:
        core = core + (S + shift)[:, :, None] * of_v
    if of_u is not None:
        core = core + of_u.mT @ (core + torch.diag_embed(S))
    p = _coordinates(basis, x)
    h = block_product(in_blocks(p, n), core.mT.to(p.dtype))  # one product a token and block, whichever sides are rotated
    return _add(W, x, basis, h.reshape(p.shape))


class AdditiveParams(TypedDict):
    delta_s: Float[Tensor, " r"]


@checked
def antipasto_additive(params: AdditiveParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U (delta_s p)`: the rotation core with no side rotated."""
    basis = _basis(W, params["delta_s"].shape[0])
    return _add(W, x, basis, _coordinates(basis, x) * params["delta_s"])


class GainParams(TypedDict):
    g: Float[Tensor, " r"]


@checked
def antipasto_gain(params: GainParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U (S ELU(g) p)`."""
    basis = _basis(W, params["g"].shape[0])
    return _add(W, x, basis, _coordinates(basis, x) * _gains(basis, params["g"], x))


class AblateParams(TypedDict):
    C: Float[Tensor, "r k"]
    alpha: Float[Tensor, " k"]


@checked
def antipasto_ablate(params: AblateParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b - (U Chat) alpha (Chat^T S Vh) x`, of rank `k`: the two thin factors cost `r k (i + o)` once per forward."""
    basis = _basis(W, params["C"].shape[0])
    C = params["C"].to(basis["S"].dtype)  # no QR in half precision
    # The floor keeps the zero tree, which is the base model, finite.
    floor = torch.finfo(C.dtype).tiny
    Chat = C / torch.linalg.vector_norm(C).clamp_min(floor) if C.shape[1] == 1 else torch.linalg.qr(C)[0]
    right = (Chat * basis["S"][:, None]).to(x.dtype).t() @ basis["Vh"].to(x.dtype)  # (k, i)
    left = basis["U"].to(x.dtype) @ Chat.to(x.dtype) * params["alpha"]  # (o, k)
    return W.updated_low_rank(x, (right, left), scale=-1.0)


class ArrowParams(TypedDict):
    M: Float[Tensor, "k k"]
    g: Float[Tensor, " tail"]


@checked
def antipasto_arrow(params: ArrowParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U [M S_b p_b; S_t ELU(g) p_t]`: dense on the first coordinates, gains on the rest."""
    M, g = params["M"], params["g"]
    k = M.shape[0]
    basis = _basis(W, k + g.shape[0])
    p = _coordinates(basis, x)
    head = F.linear(p[..., :k], M * basis["S"][:k].to(x.dtype))
    tail = p[..., k:] * _gains(basis, g, x)
    return _add(W, x, basis, torch.cat([head, tail.to(head.dtype)], dim=-1))


class DPLRParams(TypedDict):
    g: Float[Tensor, " r"]
    A: Float[Tensor, "k r"]
    B: Float[Tensor, "r k"]


@checked
def antipasto_dplr(params: DPLRParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U [S ELU(g) p + B A p]`: diagonal plus low rank."""
    basis = _basis(W, params["g"].shape[0])
    p = _coordinates(basis, x)
    return _add(W, x, basis, add_low_rank(p * _gains(basis, params["g"], x), F.linear(p, params["A"]), params["B"]))
