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
`S^-1 U^T W`, which it equals and which needs no floor for features that are always zero. The SVD is exact or within
a computed bound, in the norm of `W D`; the authors' code's is randomised.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lora_lite.core import Constants, Frozen, Means, NonNegative, another_start, exact, require_rank, require_stats
from lora_lite.variants.corda import oriented_factors, require_input
from lora_lite.variants.pissa import PiSSAConfig, pissa

asvd = another_start(pissa, "asvd", constants=("A0", "B0"))


@dataclass(frozen=True, kw_only=True)
class ASVDConfig(PiSSAConfig):
    """Config of ASVD.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0; the start does not depend on it.
        power: exponent of the mean absolute input, >= 0; 0 is PiSSA.
    """

    name = "asvd"
    calibrated = True
    statistic = Means  # no i x i matrix is gathered

    power: NonNegative = 0.5

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        moment = exact(require_stats(self, W, stats, "mean_abs"))
        require_input(self, moment)
        d = moment**self.power
        return oriented_factors(W, exact(W.dense()) * (d / d.mean()), slice(self.r), self.scale, self.svd)
