r"""HRA: a chain of Householder reflections before the frozen layer, or after it.

$$y = W R x + b \quad \text{or} \quad y = R W x + b, \qquad R = H_1 H_2 \cdots H_r, \quad H_j = I - 2\, u_j u_j^T / \lVert u_j \rVert^2$$

The chain is evaluated in compact form (the paper's eq. (5)), without a loop over reflections, and by pairs: with `u`, `v` the unit
vectors of a pair and `e = v - u`, exactly,

$$H_u H_v = I + 2 \left[ u\, (e - \lVert e \rVert^2 v)^T - e\, v^T \right], \qquad
R = I + 2 A S^{-1} B^T, \quad A = [\dots, u, -e, \dots], \ B = [\dots, e - \lVert e \rVert^2 v, v, \dots]$$

with `S` the unit upper triangular matrix that has `-2 B^T A` above its 2 x 2 diagonal blocks. Every term carries an `e`, so no
large terms cancel, as they do where each reflection is a term of its own.

Identity at init: exact, since the vectors of each pair are equal, `e = 0`, and two equal reflections undo each other.

Paper: Yuan, Liu, Xu, *Bridging the Gap between Low-Rank and Orthogonal Adaptation via Householder Reflection Adaptation*, 2024,
arXiv:2405.17484, eq. (3)-(5).

| tensor | shape | trained | init |
|---|---|---|---|
| `U` | `(i, r)`, or `(o, r)` with `side="out"` | yes | `r/2` columns uniform within sqrt(2/r), each twice |

Trained per target: `r i`, or `r o`. Needs nothing of the weight but its output.

These params are directions, not displacements: only the direction of a column matters, its length sets how far a step turns it, and
weight decay does not pull to the base model; switch it off. Strength `c` moves the second vector of each pair to `u + c (v - u)`: 0 is
the base model, 1 the adapter; negative strengths turn the other way, to first order the inverse. In bfloat16 the columns themselves are
rounded, which blurs a pair whose vectors differ by less than one percent: train in float32 there.

Departures: `r` must be even, since a chain of an odd number of reflections is never the identity (its determinant is -1); PEFT starts such
a chain at random. Gram-Schmidt, an option of the paper and PEFT, is left out: it divides zero by zero at the paired start and is not the
identity elsewhere; the paper's regulariser of `U` belongs to the loss. A zero column is left out of its pair where PEFT gives NaN.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Even, Frozen, Params, add_low_rank, checked, full_precision, kaiming


class HRAParams(TypedDict):
    U: Float[Tensor, "d r"]


def compact_chain(U: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `C = A S^{-1}` and `B`, `(d, r)` each, of `R = I + 2 C B^T`, in at least float32."""
    U = U.to(torch.promote_types(U.dtype, torch.float32))
    unit = U * U.square().sum(0).clamp_min(1e-30).rsqrt()  # a zero column stays zero
    u, v = unit[:, 0::2], unit[:, 1::2]  # (d, r/2)
    e = v - u
    A = torch.stack((u, -e), 2).flatten(1)
    B = torch.stack((torch.addcmul(e, v, e.square().sum(0), value=-1), v), 2).flatten(1)
    pair = torch.arange(U.shape[1], device=U.device) // 2
    above = -2.0 * (pair[:, None] < pair)  # the pairs themselves are sums, not products: their blocks in S are the identity
    S = above * (B.t() @ A)
    return torch.linalg.solve_triangular(S, A, upper=True, left=False, unitriangular=True), B


@checked
def hra(params: HRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, side: str = "in") -> Float[Tensor, "*b o"]:
    """Return `W R x + b`, or `R W x + b` with `side="out"`. The module's docstring has the formula and the shapes."""
    with full_precision(x):
        C, B = (t.to(x.dtype) for t in compact_chain(params["U"]))
    if side == "in":
        return W(add_low_rank(x, F.linear(x, B.t()), C, 2.0))
    y0 = W(x)
    h = F.linear(y0, B.t(), None if W.bias is None else -(W.bias @ B))  # (W x)^T B, without a second product with W
    return add_low_rank(y0, h, C, 2.0)


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """Config of HRA.

    Args:
        r: number of reflections, even, >= 2: an odd number of them is never the identity.
        side: `"in"` to reflect the layer's input, `"out"` its output without the bias.
    """

    name = "hra"
    uses = frozenset({"output", "vectors"})
    trained = "r * (i if side == 'in' else o)"
    macs = "2 * r * (i if side == 'in' else o)"

    r: Even = 8
    side: Literal["in", "out"] = "in"

    def init(self, W: Frozen, generator: torch.Generator) -> HRAParams:
        width = W.in_features if self.side == "in" else W.out_features
        return {"U": kaiming(width, self.r // 2, generator).repeat_interleave(2, dim=1)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return hra(params, W, x, side=self.side)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        u, v = params["U"][:, 0::2], params["U"][:, 1::2]
        return {"U": torch.stack((u, u + c * (v - u)), 2).flatten(1)}
