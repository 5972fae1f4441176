r"""HiRA: a low-rank update times the weight, entry by entry, which has the rank of the weight.

$$y = W x + b + (W \odot B A)\, x$$

A dense layer takes the update up into its weight and makes one product, `[W (1 + B A)] x`, for two. Packed weights take both products, and
so do low precision and autocast, where that sum would round the update away.

Identity at init: exact, since `B = 0`.

Paper: Huang, Ko, Zhuang, Tang, Zhang, *HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models*, 2025,
OpenReview:TwJrTz9cRS (ICLR).

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | uniform within 1/sqrt(i) |
| `B` | `(o, r)` | yes | zeros |

Trained per target: `r (i + o)`. Needs the dense weight in each forward: a packed one is unpacked there. The form without it,
`sum_p B[:, p] W (A[p] x)`, is `r` more products with the layer, never fewer multiply-adds than forming `B A` and one product, not even for
one token.

Departures: none. PEFT multiplies the integer codes of an 8-bit weight and refuses 4-bit ones; this uses the weight that they stand for.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Probability, Rank, checked


class HiRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]


@checked
def hira(params: HiRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + (W * B A) drop(x)`. The module's docstring has the formula and the shapes."""
    return W.updated(x, W.dense(x.dtype) * (params["B"] @ params["A"]), dropout)


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    """Config of HiRA.

    Args:
        r: rank of the factor, >= 1.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "hira"
    uses = frozenset({"output", "project", "dense"})
    steered = ("B",)
    trained = "r * (i + o)"
    macs = "0"  # a weight that takes the update up is paid for once a call, with r i o

    r: Rank = 32
    dropout: Probability = 0.0

    def init(self, W: Frozen, generator: torch.Generator) -> HiRAParams:
        A, B = W.low_rank_start(self.r, generator)
        return {"A": A, "B": B}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return hira(params, W, x, dropout=self.dropout)
