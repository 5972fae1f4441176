r"""DEFT: directions of the output that are taken out of the weight and written anew.

$$y = (I - Q U^T)\, W x + s\, Q R\, x + b, \qquad Q = P,\ U = \max(P, 0) \quad \text{or} \quad Q = U = \mathrm{qr}(P)$$

`R` starts at what is taken out, so that it is written back. As displacements from there, `P = P_0 + dP` and `R = U_0^T W / s + dR`, the
same layer is

$$y = W x + b + Q \left( s\, dR\, \mathrm{drop}(x) - (U - U_0)^T W x \right)$$

Nothing cancels in this form, and the layer's output is all that it needs of the weight. `para=True` is PaRa, which takes out and writes
nothing: there is no `R`, and `U_0` is left out.

Identity at init: exact, since `dP = 0` and `dR = 0`. PaRa does not start at the base model: a subspace is missing from its first step on.

Paper: Kumar, Anwer, Khan, Khan, Laptev, Cholakkal, *DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models*, 2025,
arXiv:2509.22793.

| tensor | shape | trained | init |
|---|---|---|---|
| `dP` | `(o, r)` | yes | zeros |
| `dR` | `(r, i)`, not with `para` | yes | zeros |
| `P0` | `(o, r)` | no | Gaussian, std 0.02 |

Trained per target: `r (i + o)`, with `para` `r o`. Needs nothing of the weight but its output.

Departures: dropout acts on the input of `dR`, PEFT's on that of `R`, whose start is then no identity in training. The orthonormal factor is
the one with a positive diagonal in the triangle. PEFT takes LAPACK's, where a column of `Q` changes its sign as an entry of `P` passes
zero, and its row of `R` does not. A subspace cannot be missing by half, so PaRa has no strength. PEFT's random start of `R` is left out.
"""

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Constants,
    Frozen,
    Params,
    Positive,
    Probability,
    Rank,
    add_low_rank,
    checked,
    expect,
    full_precision,
)


class DEFTParams(TypedDict):
    dP: Float[Tensor, "o r"]
    dR: NotRequired[Float[Tensor, "r i"]]


def orthonormal(P: Tensor) -> Tensor:
    """Compute the orthonormal factor of `P (*n, o, r)` that has a positive diagonal in the triangle: a smooth function."""
    Q, triangle = torch.linalg.qr(P)
    return Q * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def directions(P: Tensor, start: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
    """Compute `Q` and `U - U_0`, `(o, r)` each: the directions that are written, and those that are taken out. No start is no `U_0`."""
    if method == "relu":
        return P, P.relu() if start is None else P.relu() - start.relu()
    if start is None:
        return (Q := orthonormal(P)), Q
    Q, Q0 = orthonormal(torch.stack([P, start]))
    # Two factorisations of equal matrices may round apart, even in one call: at the start the second is the first.
    return Q, Q - torch.where(P.eq(start).all(), Q.detach(), Q0)


@checked
def deft(
    params: DEFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, method: str = "relu", scale: float = 1.0, dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """Return `(I - Q U^T) W x + s Q R x + b`. The module's docstring has the formula, the shapes and the displacements."""
    P0 = W.constants["P0"]
    with full_precision(x):
        P = P0 + params["dP"]
        Q, U = (t.to(x.dtype) for t in directions(P, P0.to(P.dtype) if "dR" in params else None, method))
    y0 = W(x)
    h = F.linear(y0, -U.t(), None if W.bias is None else W.bias @ U)  # -U^T W x, without a second product with W
    if "dR" in params:
        h = add_low_rank(h, W.dropped(x, dropout), params["dR"], scale)
    return add_low_rank(y0, h, Q)


@dataclass(frozen=True, kw_only=True)
class DEFTConfig(AdapterConfig):
    """Config of DEFT.

    Args:
        r: number of directions, from 1 to `o`.
        decomposition_method: `"relu"` for `Q = P` and `U = max(P, 0)`, `"qr"` for both the orthonormal factor of `P`.
        alpha: numerator of the scale `alpha / r` of `R`, dimensionless, > 0; None for a scale of 1. The start does not depend on it.
        para: whether the directions are taken out only, by PaRa.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode; 0 with `para`.
    """

    name = "deft"
    uses = frozenset({"output", "vectors"})
    trained = "r * (o if para else i + o)"
    macs = "r * (2 * o if para else i + 2 * o)"

    r: Rank = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    alpha: Positive | None = None
    para: bool = False
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            self, "dropout", not (self.para and self.dropout), "0 with para=True, which has no product to drop inputs of", "Set it to 0."
        )

    @property
    def identity(self) -> float | None:
        """Relative tolerance of the identity at init: exact, and none for PaRa."""
        return None if self.para else 0.0

    @property
    def scale(self) -> float:
        """The factor of `R`, `alpha / r`, or 1."""
        return self.alpha / self.r if self.alpha is not None else 1.0

    def constants(self, W: Frozen, generator: torch.Generator, stats: object = None) -> Constants:
        o = W.out_features
        expect(self, "r", self.r <= o, f"at most o = {o}", "Lower r or leave the layer out.")
        return {"P0": 0.02 * torch.randn(o, self.r, generator=generator)}

    def init(self, W: Frozen, generator: torch.Generator) -> DEFTParams:
        dP = torch.zeros(W.out_features, self.r)
        return {"dP": dP} if self.para else {"dP": dP, "dR": torch.zeros(self.r, W.in_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return deft(params, W, x, method=self.decomposition_method, scale=self.scale, dropout=self.dropout)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        way = "Merge it, or train DEFTConfig(para=False), which has one."
        expect(self, "para", not self.para, "False for a strength: a subspace cannot be missing by half", way)
        return super().steer(params, c)
