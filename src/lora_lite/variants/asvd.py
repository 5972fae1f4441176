r"""ASVD: LoRA that starts from the weight's singular vectors after its columns are scaled by the size of the inputs.

$$y = W x + b + s\,(B A - B_0 A_0)\, x, \qquad s = \alpha / r$$

$$W D = U S V^T, \quad B_0 = U_r \sqrt{S_r / s}, \quad A_0 = \sqrt{S_r / s}\, V_r^T D^{-1}$$

`D` is diagonal, `d_j` the mean of `|x_j|` to a power, over its mean. Trained are the increments `dA = A - A_0` and `dB = B - B_0`, by
PiSSA's function; with inputs of one size it is PiSSA.

Identity at init: exact, since both increments are zero.

Paper: Yuan, Shang, Song, Yang, Wu, Yan, Sun, *ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models*,
2023, arXiv:2312.05821, eq. (8).

| tensor | shape | trained | init |
|---|---|---|---|
| `dA` | `(r, i)` | yes | zeros |
| `dB` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | `sqrt(S_r / s) V_r^T D^-1` |
| `B0` | `(o, r)` | no | `U_r sqrt(S_r / s)` |

Trained per target: `r (i + o)`. Needs the dense weight once, at init, and at build the inputs of the layer.

Departures: the paper compresses a weight; here its decomposition is the start of an adapter, as PiSSA's is. `d` is divided by its mean, so
that the sizes of `A_0` and `B_0` do not depend on the unit of the inputs; the product does not depend on it. `V^T D^-1` is evaluated as
`S^-1 U^T W`, which it equals and which needs no floor for features that are always zero. The SVD is exact, the authors' code's randomised.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core.checked import checked
from lora_lite.core.config import expect_number
from lora_lite.core.frozen import Constants, Frozen
from lora_lite.core.statistics import Means, exact, require_stats
from lora_lite.variants.corda import oriented_factors, require_start
from lora_lite.variants.pissa import PiSSAConfig, PiSSAParams, pissa


@checked
def asvd(params: PiSSAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Give `W x + b + scale [(B0 + dB) dA + dB A0] x`, PiSSA's own function; the module's docstring has the start."""
    return pissa(params, require_start(W, "asvd"), x, scale=scale)


@dataclass(frozen=True, kw_only=True)
class ASVDConfig(PiSSAConfig):
    """Config of ASVD.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0; the start does not depend on it.
        power: exponent of the mean absolute input, >= 0; 0 is PiSSA.
    """

    name: ClassVar[str] = "asvd"
    calibrated: ClassVar[bool] = True
    statistic: ClassVar[type[Means]] = Means  # no i x i matrix is gathered

    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_number(self, "power", 0.0, math.inf, "The paper's is power=0.5.")

    def start(self, W: Frozen, stats: Any, generator: torch.Generator) -> Constants:
        """Derive `A0` and `B0` from the SVD of `W diag(d)`."""
        d = exact(require_stats(self, W, stats, "mean_abs")) ** self.power
        return oriented_factors(W, exact(W.dense()) * (d / d.mean()), slice(self.r), self.scale)

    def forward(self, params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Tensor:
        return asvd(params, W, x, scale=self.scale)
