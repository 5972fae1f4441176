r"""PiSSA: LoRA that starts from the weight's principal singular values and vectors.

$$y = W x + b + s\,(B A - B_0 A_0)\, x, \qquad B_0 = U_r \sqrt{S_r / s}, \quad A_0 = \sqrt{S_r / s}\, V_r^T, \quad s = \alpha / r$$

Trained are the increments `dA = A - A_0` and `dB = B - B_0`, and the update is evaluated as `s [B_0 dA + dB (A_0 + dA)] x`: no
difference of large numbers, which low precision would round away, and the weight stays as it is.

Identity at init: exact, since both increments are zero. The training trajectory is that of the paper's residual form.

Paper: Meng, Wang, Zhang, *PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models*, 2024,
arXiv:2404.02948, eq. (2)-(5).

| tensor | shape | trained | init |
|---|---|---|---|
| `dA` | `(r, i)` | yes | zeros |
| `dB` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | `sqrt(S_r / s) V_r^T` |
| `B0` | `(o, r)` | no | `U_r sqrt(S_r / s)` |

Trained per target: `r (i + o)`. Needs the dense weight once, at init.

Departures: the paper and PEFT overwrite the weight with `W - s B_0 A_0`; here it stays. Dividing the singular values by `s`, so that
the start does not depend on `alpha`, is PEFT's. The start is the best rank-`r` approximation to within a computed bound, or exactly with
`svd="exact"`; the paper's randomised SVD has no bound. Weight decay acts on the increments and so pulls towards the base model, not towards
a weight without its principal part.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Constants,
    Frozen,
    Params,
    Positive,
    Rank,
    SVDConfig,
    Way,
    balanced_factors,
    checked,
    require_rank,
)


class PiSSAParams(TypedDict):
    dA: Float[Tensor, "r i"]
    dB: Float[Tensor, "o r"]


def principal_factors(W: Frozen, r: int, scale: float, svd: Way = "exact") -> Constants:
    """Compute the start `A0 (r, i)`, `B0 (o, r)` with `scale B0 A0` the best rank-`r` approximation of the weight, eq. (2)-(3)."""
    weight = W.dense()
    A0, B0 = balanced_factors(weight, r, scale, svd)
    return {"A0": A0.to(weight.dtype), "B0": B0.to(weight.dtype)}


def increments(params: PiSSAParams, start: Params, W: Frozen, x: Tensor, scale: float) -> Tensor:
    """Return `W x + b + scale [B0 dA + dB (A0 + dA)] x`, the change of a product that starts at `B0 A0`."""
    return W.updated_low_rank(x, (params["dA"], params["dB"]), scale, start=(start["A0"].to(x.dtype), start["B0"].to(x.dtype)))


@checked
def pissa(params: PiSSAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale [B0 dA + dB (A0 + dA)] x`. The module's docstring has the formula and the shapes."""
    return increments(params, W.constants or principal_factors(W, params["dA"].shape[0], scale), W, x, scale)


@dataclass(frozen=True, kw_only=True)
class IncrementsConfig(AdapterConfig):
    """Base of the configs of LoRA that starts off zero, whose increments are trained.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0.
    """

    uses = frozenset({"output", "vectors", "dense"})
    trained = "r * (i + o)"
    macs = "2 * r * (i + o)"

    r: Rank = 8
    alpha: Positive = 16.0

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / r`."""
        return self.alpha / self.r

    def init(self, W: Frozen, generator: torch.Generator) -> PiSSAParams:
        return {"dA": torch.zeros_like(W.constants["A0"]), "dB": torch.zeros_like(W.constants["B0"])}


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(SVDConfig, IncrementsConfig):
    """Config of PiSSA.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0; the start does not depend on it.
    """

    name = "pissa"

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        return principal_factors(W, self.r, self.scale, self.svd)

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return pissa(params, W, x, scale=self.scale)
