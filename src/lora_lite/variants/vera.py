r"""VeRA: trained scales around random projections that all layers share.

$$y = W x + b + \lambda_b \odot \left( B_o\, (\lambda_d \odot (A_i\, \mathrm{drop}(x))) \right), \qquad
A_i = A_{:, :i}, \quad B_o = B_{:o, :}$$

`A` and `B` are drawn once for the whole model, as wide as its widest target, and stand once in the constants, under `vera`.

Identity at init: exact, since `lambda_b = 0`.

Paper: Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, 2024, arXiv:2310.11454, eq. (2), sec. 3.3.

| tensor | shape | trained | init |
|---|---|---|---|
| `lambda_d` | `(r,)` | yes | `d_initial` |
| `lambda_b` | `(o,)` | yes | zeros |
| `A` | `(r, i_max)` | no, shared | uniform within sqrt(6 / i_max) |
| `B` | `(o_max, r)` | no, shared | uniform within sqrt(6 / r) |

Trained per target: `r + o`. Needs nothing of the weight but its output.

Departures: the paper shares one pair of projections among layers of one shape, PEFT slices one pair for all, and so does this. The neutral
value of `lambda_d` is not zero, but the zero tree is the base model, and strength scales `lambda_b` alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, NonNegative, Params, Probability, Rank, checked


class VeRAParams(TypedDict):
    lambda_d: Float[Tensor, " r"]
    lambda_b: Float[Tensor, " o"]


def projections(layers: Sequence[Frozen], r: int, seed: int, parts: int = 1) -> Constants:
    """Draw `A (parts r, i_max)` and then `B (o_max, r)`, as PEFT does from the same seed."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(W.in_features for W in layers), max(W.out_features for W in layers)
    shapes = {"A": (parts * r, widest[0]), "B": (widest[1], r)}
    drawn = {}
    for name, shape in shapes.items():
        bound = math.sqrt(6 / shape[1])
        drawn[name] = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    return drawn


def of_widths(A: Tensor, B: Tensor, W: Frozen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the first `i` columns of `A` and the first `o` rows of `B`, in `dtype`. No views where all of them are meant."""
    A = A if A.shape[1] == W.in_features else A[:, : W.in_features]
    B = B if len(B) == W.out_features else B[: W.out_features]
    return A.to(dtype), B.to(dtype)


@checked
def vera(params: VeRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, seed: int = 0, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + lambda_b (B_o (lambda_d (A_i x)))`. A plain weight takes projections of its own widths, drawn from `seed`."""
    d, b = params["lambda_d"], params["lambda_b"]
    shared = W.constants or projections([W], d.shape[0], seed)
    A, B = of_widths(shared["A"], shared["B"], W, x.dtype)
    # The scales act on the activations: folded into A and B they would need the gradients of these, two more products a token.
    h = d * F.linear(W.dropped(x, dropout), A)
    y = W(x)
    return torch.addcmul(y, b.to(y.dtype), F.linear(h, B).to(y.dtype))  # under autocast the layer's output has another dtype than its input


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Config of VeRA.

    Args:
        r: rank of the projections, >= 1.
        d_initial: start of `lambda_d`, dimensionless.
        seed: of the shared projections; PEFT's `projection_prng_key`.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "vera"
    parts: ClassVar[int] = 1
    """The rows of `A` over `r`: PVeRA has a mean and a variance."""
    uses = frozenset({"output", "vectors"})
    steered = ("lambda_b",)
    trained = "r + o"
    macs = "r * (i + o) + r + o"

    r: Rank = 256
    d_initial: NonNegative = 0.1
    seed: Count = 0
    dropout: Probability = 0.0

    def share(self, layers: Sequence[Frozen]) -> Constants:
        return projections(layers, self.r, self.seed, self.parts)

    def init(self, W: Frozen, generator: torch.Generator) -> VeRAParams:
        return {"lambda_d": torch.full((self.parts * self.r,), float(self.d_initial)), "lambda_b": torch.zeros(W.out_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return vera(params, W, x, seed=self.seed, dropout=self.dropout)
