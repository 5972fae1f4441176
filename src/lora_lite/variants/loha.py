r"""LoHa: an update that is the entrywise product of two low-rank matrices, of rank up to `r^2`.

$$y = W x + b + s \left[ (w_{1a} w_{1b}) \odot (w_{2a} w_{2b}) \right] x, \qquad s = \alpha / r$$

The update is a product of two factors itself, whose columns and rows are the products of those above, pair by pair:

$$(w_{1a} w_{1b}) \odot (w_{2a} w_{2b}) = B A, \qquad
B_{k, pq} = (w_{1a})_{kp} (w_{2a})_{kq}, \quad A_{pq, l} = (w_{1b})_{pl} (w_{2b})_{ql}$$

These Khatri-Rao factors take `r^2 (i + o)` multiply-adds a token. Where the matrix itself takes fewer, `i o`, it is multiplied out and
added to the weight. So it is with many tokens, since its gradient takes one product of that size, and that of the factors two.

Identity at init: exact, since `w2_b = 0`.

Paper: Hyeon-Woo, Ye-Bin, Oh, *FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning*, 2021,
arXiv:2108.06098, prop. 1. As an adapter: Yeh, Hsieh, Gao, Yang, Oh, Gong, *Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation*, 2023, arXiv:2309.14859, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `w1_a`, `w2_a` | `(o, r)` | yes | uniform within 1/sqrt(r) |
| `w1_b` | `(r, i)` | yes | uniform within 1/sqrt(i) |
| `w2_b` | `(r, i)` | yes | zeros |

Trained per target: `2 r (i + o)`. Needs nothing of the weight but its output.

Departures: LyCORIS draws Gaussians and starts `w2_a` at zero; the uniform draws are PEFT's. `rank_dropout` divides by the share of
outputs that stay, as in PEFT. The papers' factors for a kernel's axes are left out: a convolution is adapted as the matrix of its patches.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, NonNegative, Params, Probability, Rank, checked, kaiming
from lora_lite.variants._dropout import kept
from lora_lite.variants._hadamard import plus_product


class LoHaParams(TypedDict):
    w1_a: Float[Tensor, "o r"]
    w1_b: Float[Tensor, "r i"]
    w2_a: Float[Tensor, "o r"]
    w2_b: Float[Tensor, "r i"]


@checked
def loha(
    params: LoHaParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, rank_dropout: float = 0.0, module_dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale [(w1_a w1_b) * (w2_a w2_b)] x`. The module's docstring has the formula and the shapes."""
    w1_a, w1_b, w2_a, w2_b = (params[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    stays = kept(W, w1_a, rank_dropout, module_dropout, rescale=True)
    if stays is not None:
        w1_a = stays[:, None] * w1_a
    return plus_product(W, x, (w1_a, w1_b), (w2_a, w2_b), scale)


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(AdapterConfig):
    """Config of LoHa.

    Args:
        r: rank of each factor, >= 1; the update has up to its square.
        alpha: numerator of the scale, dimensionless, >= 0.
        rank_dropout: probability of dropping an output of the update, in [0, 1), drawn once a call in training mode.
        module_dropout: probability of dropping the update of the layer, in [0, 1), drawn once a call in training mode.
    """

    name = "loha"
    uses = frozenset({"output", "project"})
    steered = ("w2_b",)  # the update is linear in each factor
    trained = "2 * r * (i + o)"
    macs = "r * r * (i + o) if r * r * (i + o) < i * o else 0"  # a weight that takes the update up is paid for once a call

    r: Rank = 8
    alpha: NonNegative = 8.0
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0

    def init(self, W: Frozen, generator: torch.Generator) -> LoHaParams:
        i, o, r = W.in_features, W.out_features, self.r
        w1_a, w1_b, w2_a = (kaiming(*shape, generator) for shape in ((o, r), (r, i), (o, r)))
        return {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": torch.zeros(r, i)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        drops = {"rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout}
        return loha(params, W, x, scale=self.alpha / self.r, **drops)
