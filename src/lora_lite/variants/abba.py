r"""ABBA: an update that is the entrywise product of two trained low-rank matrices, the first from the weight's singular vectors.

$$y = W x + b + s \left[ (B_1 A_1) \odot (B_2 A_2) \right] x, \qquad s = \sqrt{\alpha_1 \alpha_2}$$

The update has up to rank `r1 r2`. It is LoHa's function with ranks, start and scale of its own, computed in the same two forms: by
Khatri-Rao factors in `r1 r2 (i + o)` multiply-adds a token, or where `i o` are fewer, as a matrix.

Identity at init: exact, since `B2 = 0`.

Paper: Singhal, Ponkshe, Vartak, Vepakomma, *ABBA-Adapters: Efficient and Expressive Fine-Tuning of Foundation Models*, 2025,
arXiv:2505.14238, sec. 2. The scale and the starts are those of its code.

| tensor | shape | trained | init |
|---|---|---|---|
| `A1` | `(r1, i)` | yes | `S_r1^(1/2) V_r1^T` |
| `B1` | `(o, r1)` | yes | `U_r1 S_r1^(1/2)` |
| `A2` | `(r2, i)` | yes | uniform within sqrt(6 / i) |
| `B2` | `(o, r2)` | yes | zeros |

Trained per target: `(r1 + r2) (i + o)`. Needs the dense weight once, at init.

Departures: the paper's code takes a randomised SVD, here it is exact. Its dropout, which it declares and never applies, is left out, and
small layers multiply the update out.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Frozen, NonNegative, Params, Size, SVDConfig, balanced_factors, checked, expect, kaiming
from lora_lite.variants._hadamard import plus_product


class ABBAParams(TypedDict):
    A1: Float[Tensor, "r1 i"]
    B1: Float[Tensor, "o r1"]
    A2: Float[Tensor, "r2 i"]
    B2: Float[Tensor, "o r2"]


@checked
def abba(params: ABBAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale [(B1 A1) * (B2 A2)] x`. The module's docstring has the formula and the shapes."""
    return plus_product(W, x, (params["B1"], params["A1"]), (params["B2"], params["A2"]), scale)


@dataclass(frozen=True, kw_only=True)
class ABBAConfig(SVDConfig):
    """Config of ABBA.

    Args:
        r1: rank of the factor that starts from the weight, from 1 to the smaller width of the layer.
        r2: rank of the factor that starts at zero, >= 1; the update has up to `r1 r2`.
        alpha1, alpha2: the scale is the root of their product, dimensionless, >= 0.
    """

    name = "abba"
    uses = frozenset({"output", "project", "dense"})
    steered = ("B2",)  # the update is linear in each factor
    trained = "(r1 + r2) * (i + o)"
    macs = "r1 * r2 * (i + o) if r1 * r2 * (i + o) < i * o else 0"  # a weight that takes the update up is paid for once a call

    r1: Size = 8
    r2: Size = 8
    alpha1: NonNegative = 8.0
    alpha2: NonNegative = 8.0

    def init(self, W: Frozen, generator: torch.Generator) -> ABBAParams:
        i, o = W.in_features, W.out_features
        expect(self, "r1", self.r1 <= min(i, o), f"at most min(i, o) = {min(i, o)} for a layer of shape ({o}, {i})", "Lower r1.")
        A1, B1 = balanced_factors(W.dense(), self.r1, svd=self.svd)
        return {"A1": A1, "B1": B1, "A2": 6**0.5 * kaiming(self.r2, i, generator), "B2": torch.zeros(o, self.r2)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return abba(params, W, x, scale=(self.alpha1 * self.alpha2) ** 0.5)
