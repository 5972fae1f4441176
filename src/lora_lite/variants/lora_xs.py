r"""LoRA-XS: a small trained matrix between frozen singular vectors of the weight.

$$y = W x + b + s\, B R A\, x, \qquad A = S_r V_r^T, \quad B = U_r, \quad s = \alpha / r$$

Identity at init: approximate, since `R` starts at about 1e-5 as in the official code: the output is off by about `1e-5 s sqrt(r)`
of its size. With `init="zeros"` it is exact, and the gradient does not vanish there.

Paper: Bałazy, Banaei, Aberer, Tabor, *LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters*, 2024,
arXiv:2405.17604, sec. 2.

| tensor | shape | trained | init |
|---|---|---|---|
| `R` | `(r, r)` | yes | Gaussian, std 1e-5, or zeros |
| `A` | `(r, i)` | no | `S_r V_r^T` |
| `B` | `(o, r)` | no | `U_r` |

Trained per target: `r^2`. Needs the dense weight once, at init.

Departures: the official code takes a randomised SVD. Here a bound on its error is computed, and where it is not met the SVD is exact.
Signs are fixed by the largest entry of each row of `V_r^T` being positive. The defaults give `s = 1`, as in the official runs.
"""

import math
from dataclasses import InitVar, dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    ANGLE,
    Constants,
    Frozen,
    NonNegative,
    Params,
    Rank,
    SVDConfig,
    Way,
    add_low_rank,
    checked,
    leading_svd,
    require_rank,
)

STD = 1e-5  # of R at init, in the official code


class LoRAXSParams(TypedDict):
    R: Float[Tensor, "r r"]


def singular_factors(W: Frozen, r: int, svd: Way = "exact") -> Constants:
    """Compute `A = S_r V_r^T (r, i)` and `B = U_r (o, r)`: all of the singular values lie in `A`."""
    weight = W.dense()
    U, S, Vh = leading_svd(weight, r, svd, angle=ANGLE)
    return {"A": (S[:, None] * Vh).to(weight.dtype), "B": U.to(weight.dtype)}


@checked
def lora_xs(params: LoRAXSParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale B R A x`. The module's docstring has the formula and the shapes."""
    R = params["R"]
    basis = W.constants or singular_factors(W, R.shape[0])
    h = F.linear(F.linear(x, basis["A"].to(x.dtype)), R)  # (*b, r)
    return add_low_rank(W(x), h, basis["B"].to(x.dtype), scale)


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(SVDConfig):
    """Config of LoRA-XS.

    Args:
        r: number of singular directions, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless.
        init, start: `"normal"` draws `R` with standard deviation 1e-5, `"zeros"` starts at the base model to the bit; one option, kept as
            `start`, since `init` is the method.
    """

    name = "lora_xs"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "r * r"
    macs = "r * (i + o) + r * r"

    r: Rank = 16
    alpha: NonNegative = 16.0
    start: Literal["normal", "zeros"] = "normal"
    init: InitVar[str]

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / r`."""
        return self.alpha / self.r

    @property
    def identity(self) -> float:
        """The output's relative error at init: `R` stretches by at most about `2 STD sqrt(r)`."""
        return 0.0 if self.start == "zeros" else min(2 * STD * self.scale * math.sqrt(self.r), 0.5)

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        return singular_factors(W, self.r, self.svd)

    def init(self, W: Frozen, generator: torch.Generator) -> LoRAXSParams:
        if self.start == "zeros":
            return {"R": torch.zeros(self.r, self.r)}
        return {"R": STD * torch.randn(self.r, self.r, generator=generator, device=generator.device)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return lora_xs(params, W, x, scale=self.scale)
