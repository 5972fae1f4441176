r"""SSVD: a rotation of the weight's principal input directions and a shift of its principal singular values.

$$y = W x + b + U_r \left[ (S_r + \sigma(\mathrm{gate})\, s) \odot (G\, V_r^T x) - S_r \odot (V_r^T x) \right], \qquad
G = I - 2 K \ \text{ or } \ (I - K) (I + K)^{-1}$$

`K` is skew, its entries above the diagonal are trained. The bracket is one `(r, r)` matrix times `V_r^T x`, built once per forward from
increments, `S (G - I) + sigma(gate) s G`, so that nothing large cancels.

Identity at init: exact, since `s = 0` and `K = 0`.

Paper: Wang, Watanabe, Van hamme, *SSVD: Structured SVD for Parameter-Efficient Fine-Tuning and Benchmarking under Domain Shift in ASR*,
2025, arXiv:2509.02830, eq. (8)-(9), Cayley map (10), first order (13).

| tensor | shape | trained | init |
|---|---|---|---|
| `s` | `(r,)` | yes | zeros |
| `gate` | `()` | yes | zero |
| `K` | `(r (r - 1) / 2,)` | yes | zeros |
| `U` | `(o, r)` | no | left singular vectors |
| `S` | `(r,)` | no | singular values |
| `Vh` | `(r, i)` | no | right singular vectors |

Trained per target: `r + 1 + r (r - 1) / 2`. Needs the dense weight once, at init.

Departures: the gate is ESPnet's, not the paper's; it has no gradient while `s = 0`. The paper sets a share of the rank, 30 to 50 %; here
`r` is a number. The first-order `G` is the paper's default, and no rotation: `|G^T G - I|` grows with the square of `K`, so
`cayley="exact"` is the choice for long training. ESPnet factorises the transposed weight where `o < i`, which rotates the output
directions of such layers; `espnet_orientation=True` does the same.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import ANGLE, Constants, Frozen, Params, SVDConfig, Way, Within, checked, leading_svd, require_rank
from lora_lite.core.linalg import add_low_rank, cayley_excess, skew


class SSVDParams(TypedDict):
    s: Float[Tensor, " r"]
    gate: Float[Tensor, ""]
    K: Float[Tensor, " r*(r-1)//2"]


def singular_triplets(W: Frozen, r: int, svd: Way = "exact") -> Constants:
    """Compute the top `r` of the SVD, `U (o, r)`, `S (r)`, `Vh (r, i)`. The values stay in at least float32."""
    weight = W.dense()
    U, S, Vh = leading_svd(weight, r, svd, angle=ANGLE)
    return {"U": U.to(weight.dtype), "S": S, "Vh": Vh.to(weight.dtype)}


@checked
def ssvd(
    params: SSVDParams, W: Frozen, x: Float[Tensor, "*b i"], *, cayley: str = "first_order", espnet_orientation: bool = False
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U [(S + sigma(gate) s) G - S] Vh x`. The module's docstring has the formula and the shapes."""
    basis = W.constants or singular_triplets(W, params["s"].shape[0])
    S = basis["S"]
    shift = params["s"].to(S.dtype) * params["gate"].to(S.dtype).sigmoid()
    K = skew(params["K"].to(S.dtype), S.shape[0])
    excess = -2 * K if cayley == "first_order" else cayley_excess(-K)  # G - I: eq. (13), eq. (10)
    outputs = espnet_orientation and W.out_features < W.in_features  # W^T = V (S + ds) G U^T: the same product, transposed
    core = excess.mT * (S + shift) if outputs else (S + shift)[:, None] * excess
    core = (core + torch.diag_embed(shift)).to(x.dtype)
    h = F.linear(F.linear(x, basis["Vh"].to(x.dtype)), core)  # (*b, r)
    return add_low_rank(W(x), h, basis["U"].to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class SSVDConfig(SVDConfig):
    """Config of SSVD.

    Args:
        r: number of singular directions, from 2 to the smaller width of the layer.
        cayley: `"first_order"` takes `G = I - 2 K`, `"exact"` the rotation `(I - K) (I + K)^{-1}`.
        espnet_orientation: rotate the output directions instead of the input's in layers with `o < i`, as ESPnet does.
    """

    name = "ssvd"
    uses = frozenset({"output", "vectors", "dense"})
    steered = ("s", "K")  # G(-c) = G(c)^T; the gate is no displacement
    trained = "r + 1 + r * (r - 1) // 2"
    macs = "r * (i + o) + r * r"

    r: Annotated[int, Within(2)] = 8
    cayley: Literal["first_order", "exact"] = "first_order"
    espnet_orientation: bool = False

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        return singular_triplets(W, self.r, self.svd)

    def init(self, W: Frozen, generator: torch.Generator) -> SSVDParams:
        return {"s": torch.zeros(self.r), "gate": torch.zeros(()), "K": torch.zeros(self.r * (self.r - 1) // 2)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return ssvd(params, W, x, cayley=self.cayley, espnet_orientation=self.espnet_orientation)
