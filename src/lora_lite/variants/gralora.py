r"""GraLoRA: a grid of small low-rank updates, one for each block of the weight.

$$y = W x + b + s\, [z_1; \dots; z_k] \; (+\, s\, B_g A_g\, \mathrm{drop}(x)), \qquad z_j = \sum_n B_{jn}^T A_{nj}^T\, \mathrm{drop}(x)_n,
\qquad s = \alpha / (r + h)$$

Input and output are cut into `k` chunks. The block from chunk `n` to chunk `j` has rank `r / k`: `A_nj` is the `j`-th group of `r / k`
columns of `A[n]`, `B_jn` the `n`-th group of rows of `B[j]`. So all blocks take two batched products, with a transpose between them.

Identity at init: exact, since `B = 0` and `B_g = 0`.

Paper: Jung, Ahn, Kim, Kim, Park, *GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning*, 2025,
arXiv:2505.20355.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(k, i/k, r)` | yes | uniform within 1/sqrt(i/k) |
| `B` | `(k, r, o/k)` | yes | zeros |
| `A_general`, `B_general` | `(h, i)`, `(o, h)` | yes, with `hybrid_r = h > 0` | uniform within 1/sqrt(i); zeros |

Trained per target: `(r + h) (i + o)`, as LoRA of rank `r + h`. Needs nothing of the weight but its output.

Departures: none from PEFT, except that its two parts draw their dropout apart, and here one dropped input serves both.
"""

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Count,
    Frozen,
    NonNegative,
    Params,
    Probability,
    Rank,
    Size,
    add_low_rank,
    checked,
    expect,
    kaiming,
    require_divisor,
)


class GraLoRAParams(TypedDict):
    A: Float[Tensor, "k i_k r"]
    B: Float[Tensor, "k r o_k"]
    A_general: NotRequired[Float[Tensor, "h i"]]
    B_general: NotRequired[Float[Tensor, "o h"]]


@checked
def gralora(params: GraLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale [z_1; ...; z_k]`. The module's docstring has the formula and the shapes."""
    y = W(x)
    x = W.dropped(x, dropout)
    k, width, r = params["A"].shape
    h = torch.bmm(x.reshape(-1, k, width).transpose(0, 1), params["A"])  # (n, tokens, r)
    h = h.unflatten(-1, (k, r // k)).permute(2, 1, 0, 3).flatten(2)  # (j, tokens, r): what each input chunk has for output chunk j
    z = torch.bmm(h, params["B"]).transpose(0, 1)  # (tokens, k, o/k)
    y = torch.add(y.reshape(z.shape), z, alpha=scale).view(y.shape)
    if "A_general" in params:
        y = add_low_rank(y, F.linear(x, params["A_general"]), params["B_general"], scale)
    return y


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig(AdapterConfig):
    """Config of GraLoRA.

    Args:
        r: sum of the ranks of the blocks of one row, >= 1, a multiple of `k`.
        alpha: numerator of the scale, dimensionless, >= 0.
        k: chunks of the input and of the output, >= 1, a divisor of `i`, `o` and `r`; 2 for ranks up to 32, 4 from 64 on.
        hybrid_r: rank of a plain LoRA beside the blocks, or 0 for none.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "gralora"
    uses = frozenset({"output", "vectors"})
    steered = ("B", "B_general")  # the update is linear in them
    trained = "(r + hybrid_r) * (i + o)"
    macs = "(r + hybrid_r) * (i + o)"

    r: Rank = 32
    alpha: NonNegative = 64.0
    k: Size = 2
    hybrid_r: Count = 0
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "r", self.r % self.k == 0, f"a multiple of k = {self.k}", f"Use e.g. r={self.k * max(1, round(self.r / self.k))}.")

    def init(self, W: Frozen, generator: torch.Generator) -> GraLoRAParams:
        i, o, k, r, h = W.in_features, W.out_features, self.k, self.r, self.hybrid_r
        require_divisor(self, "k", i, "i")
        require_divisor(self, "k", o, "o")
        A = kaiming(k * r, i // k, generator).view(k, r, i // k).mT.contiguous()
        blocks: GraLoRAParams = {"A": A, "B": torch.zeros(k, r, o // k)}
        return {**blocks, "A_general": kaiming(h, i, generator), "B_general": torch.zeros(o, h)} if h else blocks

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return gralora(params, W, x, scale=self.alpha / (self.r + self.hybrid_r), dropout=self.dropout)
