r"""LoRA: a low-rank update beside a frozen weight.

$$y = W x + b + s\, B (A\, \mathrm{drop}(x)), \qquad s = \alpha / r \ \text{ or, rank-stabilised, } \ \alpha / \sqrt{r}$$

Identity at init: exact, since `B = 0` (at an embedding `A = 0`).

Paper: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large Language Models*, 2021,
arXiv:2106.09685, eq. (3). Rank-stabilised scale: Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with
LoRA*, 2023, arXiv:2312.03732.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | uniform within 1/sqrt(i) |
| `B` | `(o, r)` | yes | zeros |

On an embedding `A` starts at zero and `B` is Gaussian, as in PEFT.

Trained per target: `r (i + o)`. Needs nothing of the weight but its output.

Departures: the paper's text draws `A` from a Gaussian; its code and PEFT draw it uniformly, and so does this. `alpha`
defaults to 16, twice PEFT's. Dropout falls on the adapter's input only, never on the base path, and acts in training mode.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, NonNegative, Params, Probability, Rank, add_low_rank, checked


class LoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]


@checked
def lora(params: LoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale B A drop(x)`. The module's docstring has the formula and the shapes."""
    return add_low_rank(W(x), W.project(x, params["A"], dropout), params["B"], scale)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Config of LoRA.

    Args:
        r: rank of the update, >= 1.
        alpha: numerator of the scale, dimensionless, >= 0.
        rslora: divide `alpha` by `sqrt(r)` instead of `r`.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "lora"
    uses = frozenset({"output", "project"})
    steered: ClassVar[tuple[str, ...] | None] = ("B",)  # the update is linear in B; scaling A too would square the strength
    trained = "r * (i + o)"
    macs = "r * (i + o)"

    r: Rank = 8
    alpha: NonNegative = 16.0
    rslora: bool = False
    dropout: Probability = 0.0

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / r` or `alpha / sqrt(r)`."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, W: Frozen, generator: torch.Generator) -> LoRAParams:
        A, B = W.low_rank_start(self.r, generator)
        return {"A": A, "B": B}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return lora(params, W, x, scale=self.scale, dropout=self.dropout)
