r"""OLoRA: LoRA that starts from the orthonormal basis of the weight's first columns.

$$y = W x + b + s\,(B A - B_0 A_0)\, x, \qquad B_0 = Q_r, \quad A_0 = R_r, \quad W = Q R, \quad s = \alpha / r$$

`Q_r` is the first `r` columns of `Q`, `R_r` the first `r` rows of `R`, so that the start `B_0 A_0` is the weight's projection on the span
of its first `r` columns. Trained are the increments `dA` and `dB`, and the update is evaluated as PiSSA's, `s [B_0 dA + dB (A_0 + dA)] x`.

Identity at init: exact, since both increments are zero. The training trajectory is that of the paper's residual form.

Paper: Büyükakyüz, *OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models*, 2024, arXiv:2406.01775.

| tensor | shape | trained | init |
|---|---|---|---|
| `dA` | `(r, i)` | yes | zeros |
| `dB` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | `R_r` |
| `B0` | `(o, r)` | no | `Q_r` |

Trained per target: `r (i + o)`. Needs the dense weight once, at init.

Departures: the paper and PEFT overwrite the weight with `W - s B_0 A_0`; here it stays. Only the first `r` columns are decomposed, since
`Q_r` depends on no other and `R_r = Q_r^T W`. As in PEFT, and unlike PiSSA, `s` is not divided out of the start, which grows with
`alpha`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Constants, Frozen, Params, checked, require_rank
from lora_lite.variants.pissa import IncrementsConfig, PiSSAParams, increments


def orthonormal_factors(W: Frozen, r: int) -> Constants:
    """Compute the start `A0 = R_r (r, i)`, `B0 = Q_r (o, r)` of the reduced decomposition `W = Q R`, in at least float32."""
    weight = W.dense()
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    Q = torch.linalg.qr(exact[:, :r]).Q
    return {"A0": (Q.t() @ exact).to(weight.dtype), "B0": Q.contiguous().to(weight.dtype)}


@checked
def olora(params: PiSSAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale [B0 dA + dB (A0 + dA)] x`. The module's docstring has the formula and the shapes."""
    return increments(params, W.constants or orthonormal_factors(W, params["dA"].shape[0]), W, x, scale)


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(IncrementsConfig):
    """Config of OLoRA.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0.
    """

    name = "olora"

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        return orthonormal_factors(W, self.r)

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return olora(params, W, x, scale=self.scale)
