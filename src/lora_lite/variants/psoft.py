r"""PSOFT: the principal subspace of the weight is rotated, and each of its directions stretched.

$$y = W x + b + B (R - I) A\, \mathrm{drop}(x), \qquad B A = U_r S_r V_r^T, \quad
R = \mathrm{diag}(1 + b)\, (I + Q)(I - Q)^{-1}\, \mathrm{diag}(1 + a)$$

with `Q` skew. By default `A = V_r^T` has orthonormal rows; then without `a` and `b` the weight's part in the subspace, `U_r S_r R V_r^T`,
keeps its singular values. `R - I` is computed without `I`, so that small angles keep their digits.

Identity at init: exact, since `Q`, `a` and `b` are zero.

Paper: Wu, Hu, Min, Wang, *Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation*, 2025, arXiv:2505.11235.

| tensor | shape | trained | init |
|---|---|---|---|
| `Q` | `(r (r-1) / 2,)`, or `(r, r)` without `orth` | yes | zeros |
| `b`, `a` (`mag_b`, `mag_a`) | `(r,)` | yes | zeros |
| `A` | `(r, i)` | no | `V_r^T`, or `sqrt(S_r) V_r^T` with `"pissa_init"` |
| `B` | `(o, r)` | no | `U_r S_r`, or `U_r sqrt(S_r)` |

`Q` holds the upper triangle of the skew matrix row by row; without `orth` it is the free `R - I` between the two scales.

Trained per target: `r (r-1) / 2 + 2 r`, less without magnitudes. Needs the dense weight once, at init.

`cayley="series"` is `I + 2 Q + 2 Q^2 + ... + Q^(terms-1)`, which rotates in the direction of the exact map (unlike [OFT](oft.md), whose two
maps are opposite) and is orthogonal for small `Q` only. `eps` then bounds the Frobenius norm of `Q`.

Departures: PEFT's `psoft_alpha` is left out. It divides `B` and multiplies the update, and so cancels. PEFT trains `1 + a` and `1 + b`, and
`R` itself without `orth`; these are deviations. The signs of the singular vectors are those that `torch.linalg.svd` gives in float32, as in
PEFT, whose files hold `R` alone: with other signs `R` would mean another rotation. So the SVD is exact by default, and files of PEFT's
are written of that alone. Files of this library hold `A` and `B`. PEFT's randomised SVD is left out.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    ANGLE,
    Constants,
    Frozen,
    Params,
    Probability,
    Rank,
    SVDConfig,
    Way,
    Within,
    add_low_rank,
    cayley_excess,
    checked,
    full_precision,
    leading_svd,
    note,
    require_rank,
    skew,
)
from lora_lite.core.certificate import EXACT
from lora_lite.variants.oft import excess_rotation, project


class PSOFTParams(TypedDict):
    Q: Float[Tensor, "*q"]
    b: NotRequired[Float[Tensor, " r"]]
    a: NotRequired[Float[Tensor, " r"]]


def principal_subspace(W: Frozen, r: int, ab_svd_init: str, svd: Way = "exact") -> Constants:
    """Compute `A (r, i)` and `B (o, r)` with `B A` the best rank-`r` approximation of the weight; signs as the exact SVD gives them."""
    weight = W.dense()
    if svd == "exact":
        U, S, V = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        U, S, V = U[:, :r], S[:r], V[:r]
        note(EXACT)
    else:
        U, S, V = leading_svd(weight, r, svd, angle=ANGLE)
    left, right = (S.sqrt(), S.sqrt()) if ab_svd_init == "pissa_init" else (S, torch.ones_like(S))
    return {"A": (right[:, None] * V).to(weight.dtype), "B": (U * left).to(weight.dtype)}


def excess_core(params: PSOFTParams, r: int, cayley: str, terms: int, eps: float | None) -> Tensor:
    """Compute `R - I`, `(r, r)`, in at least float32."""
    Q = params["Q"].to(torch.promote_types(params["Q"].dtype, torch.float32))
    if Q.dim() == 2:
        core = Q
    elif cayley == "exact":
        core = cayley_excess(skew(Q, r))
    else:
        core = excess_rotation(Q[None] if eps is None else project(Q[None], r, eps), r, "series", terms)[0]
    zeros = Q.new_zeros(r)
    a, b = (params[name].to(Q.dtype) if name in params else zeros for name in ("a", "b"))
    # (1 + b) (C - I + I) (1 + a) - I, without I
    return (1 + b)[:, None] * core * (1 + a) + torch.diag_embed(a + b + a * b)


@checked
def psoft(
    params: PSOFTParams,
    W: Frozen,
    x: Float[Tensor, "*b i"],
    *,
    r: int,
    ab_svd_init: str = "psoft_init",
    cayley: str = "exact",
    terms: int = 5,
    eps: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + B (R - I) A drop(x)`. The module's docstring has the formula and the shapes."""
    basis = W.constants or principal_subspace(W, r, ab_svd_init)
    with full_precision(x):
        core = excess_core(params, r, cayley, terms, eps).to(x.dtype)
    h = F.linear(W.dropped(x, dropout), basis["A"].to(x.dtype))
    return add_low_rank(W(x), F.linear(h, core), basis["B"].to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(SVDConfig):
    """Config of PSOFT.

    Args:
        r: dimension of the subspace, from 1 to the smaller width of the layer.
        orth: rotate the subspace; without, its matrix is free.
        mag_b: train a factor for each direction after the rotation.
        mag_a: train a factor for each direction before it.
        ab_svd_init: `"psoft_init"` leaves the singular values in `B`; `"pissa_init"` splits them, and the rotation then changes them.
        cayley: `"exact"` or `"series"`.
        terms: terms of the series as PEFT counts them, >= 2; 3 is the same as 4. Not used by `"exact"`.
        eps: bound of the Frobenius norm of `Q` in the series, in (0, 1), or None.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
        svd: `"exact"`, by which PEFT's files are written and read, or `"auto"` as in PiSSA's config, without files of PEFT's.
    """

    name = "psoft"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "(r * (r - 1) // 2 if orth else r * r) + (mag_b + mag_a) * r"
    macs = "r * (i + o) + r * r"

    r: Rank = 32
    orth: bool = True
    mag_b: bool = True
    mag_a: bool = True
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    cayley: Literal["exact", "series"] = "exact"
    terms: Annotated[int, Within(2)] = 5
    eps: Annotated[float, Within(0, 1, above=True)] | None = None
    dropout: Probability = 0.0
    svd: Literal["auto", "exact"] = "exact"

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        return principal_subspace(W, self.r, self.ab_svd_init, self.svd)

    def init(self, W: Frozen, generator: torch.Generator) -> PSOFTParams:
        params: PSOFTParams = {"Q": torch.zeros(self.r * (self.r - 1) // 2) if self.orth else torch.zeros(self.r, self.r)}
        if self.mag_b:
            params["b"] = torch.zeros(self.r)
        if self.mag_a:
            params["a"] = torch.zeros(self.r)
        return params

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        statics = {"r": self.r, "cayley": self.cayley, "terms": self.terms, "eps": self.eps, "dropout": self.dropout}
        return psoft(params, W, x, ab_svd_init=self.ab_svd_init, **statics)
