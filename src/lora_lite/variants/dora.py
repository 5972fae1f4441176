r"""DoRA: a low-rank update of the weight's direction and a trained magnitude per output.

$$V = W + s B A, \quad n_k = \lVert V_k \rVert_2, \quad
y = \frac{\lVert w_k \rVert + m_k}{n_k} \odot (W x + s B A x) + b$$

`n` is detached, fixed in the gradient (the paper's sec. 4.3). The row norms of `V` are expanded, not materialised:
`||w_k + s b_k A||^2 = ||w_k||^2 + 2 s <(W A^T)_k, b_k> + s^2 b_k (A A^T) b_k^T`, which costs `r` extra tokens through the layer.

Identity at init: exact. With `B = 0` and `m = 0` both norms are the same floating-point number, and the output is the base
output plus a zero.

Paper: Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen, *DoRA: Weight-Decomposed Low-Rank Adaptation*, 2024, arXiv:2402.09353,
eq. (5).

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | uniform within 1/sqrt(i) |
| `B` | `(o, r)` | yes | zeros |
| `m` | `(o,)` | yes | zeros |
| `sqnorm` | `(o,)` | no | squared row norms of `W` |

Trained per target: `r (i + o) + o`. Needs the weight's row norms once.

Departures: the paper and PEFT train the magnitude itself; `m` is its deviation from the weight's row norm, so that zero is the
base model and weight decay pulls there. The bias is not scaled, as in PEFT. With dropout, in training mode, the base product of
the magnitude's correction sees the dropped input too, as in PEFT.
A second derivative does not see the detached norm: the Hessian of DoRA is that of the function as it is differentiated here.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Constants, Frozen, Params, add_low_rank, checked, gate
from lora_lite.variants.lora import LowRankConfig


class DoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    m: Float[Tensor, " o"]


_ROWS = 256


def row_norms(W: Frozen) -> Constants:
    """Compute `||w_k||^2`, at least in float32: a bfloat16 sum over a row would lose its last digits."""
    weight = W.dense()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.empty(len(weight), dtype=dtype, device=weight.device)
    for own, rows in zip(norms.split(_ROWS), weight.split(_ROWS)):  # the norm of rows in bfloat16 casts all of them first
        own.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=dtype))
    return {"sqnorm": norms.square()}


def gains(params: DoRAParams, W: Frozen, scale: float) -> Tensor:
    """Compute `(||w|| + m) / n`, `(o,)`, at least in float32."""
    sqnorm = (W.constants or row_norms(W))["sqnorm"]
    A, B = params["A"].detach(), params["B"].detach().to(sqnorm.dtype)
    WA = W.matmul(A).t().to(sqnorm.dtype)  # (o, r)
    A = A.to(sqnorm.dtype)
    cross = (B * torch.addmm(WA, B, A @ A.t(), beta=2 * scale, alpha=scale**2)).sum(1)
    n = (sqnorm + cross).clamp_min(torch.finfo(torch.float32).tiny).sqrt()  # the gain of a row of zeros fits any dtype but float16
    return (sqnorm.sqrt() + params["m"].to(sqnorm.dtype)) / n


@checked
def dora(params: DoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `(||w|| + m) / n (W x + scale B A x) + b`. The module's docstring has the formula and the shapes."""
    gain = gains(params, W, scale)
    if W.bias is None and not (dropout and W.training):
        return gate(W.updated_low_rank(x, (params["A"], params["B"]), scale), gain - 1)
    if dropout and W.training:
        y0, x = W(x), W.dropped(x, dropout)
        y = torch.addcmul(y0, W.matmul(x), (gain - 1).to(y0.dtype))
    else:
        y = gate(W(x), gain - 1, W.bias)
    return add_low_rank(y, F.linear(x, params["A"]), gain.to(x.dtype)[:, None] * params["B"], scale)


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LowRankConfig):
    """Config of DoRA: the fields of LoRA, with the same meanings."""

    name = "dora"
    uses = frozenset({"output", "vectors", "matmul", "dense"})
    steered = ("B", "m")
    trained = "r * (i + o) + o"
    macs = "r * (i + o) + o"

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        return row_norms(W)

    def init(self, W: Frozen, generator: torch.Generator) -> DoRAParams:
        A, B = W.low_rank_start(self.r, generator)
        return {"A": A, "B": B, "m": torch.zeros(W.out_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return dora(params, W, x, scale=self.scale, dropout=self.dropout)
