r"""CLOVER: the outputs of each attention head are mapped by a full matrix of their own, in coordinates taken from the weight.

$$y_h = y^0_h + D_h^T y^0_h, \qquad y^0 = W x + b, \qquad D_h = R_h^{-1}\, dR_h, \qquad [W_h \,|\, b_h]^T = Q_h R_h$$

with `W_h` the rows of head `h`. This is the paper's model, `Q_h (R_h + dR_h)`, without `Q_h`: the layer gives it. `core="free"` trains
`D_h` itself, which reaches the same functions without a look at the weight, in other coordinates for the optimiser.

Identity at init: exact, since `dR = 0`.

Paper: Meng, Tang, Jiang, Zhang, *CLOVER: Cross-Layer Orthogonal Vectors Pruning and Fine-Tuning*, 2024, arXiv:2411.17426, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `dR` | `(H, h, h)` | yes | zeros |
| `R_inv` (not `"free"`) | `(H, h, h)` | no | inverses of `R_h`, the diagonals of `R_h` positive |

with `h = head_dim` and `H = o / h` heads.

Trained per target: `o h`. Needs the dense weight once, at init; nothing of it with `"free"`.

Departures: the official code overwrites the weight by `Q` and the core by `R`, in the model's dtype, which rounds the base; here it stays
and the core is an increment. Its text gives the key layer the QR core, its code the query layer: `target_names` says which layers have one.
It takes the head's width as hidden size by heads, which some models set apart: `head_dim` is a field. It drops entries of the base's output
before the core; there is no dropout here. A head whose rows depend on each other, such as one with a row of zeros, has no inverse; its
`D_h` is trained itself.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Frozen, Params, Size, checked, expect, full_precision, require_divisor

SINGULAR = 1e6  # the condition number, about, beyond which float32 has no digits left


class CLOVERParams(TypedDict):
    dR: Float[Tensor, "H h h"]


def qr_cores(W: Frozen, head_dim: int) -> Tensor:
    """Compute the inverses of `R_h`, `(H, h, h)`, in at least float32; the identity where a head's rows depend on each other."""
    rows = W.dense(torch.promote_types(W.dtype, torch.float32))
    if W.bias is not None:
        rows = torch.cat([rows, W.bias.detach().to(rows)[:, None]], 1)
    R = torch.linalg.qr(rows.view(-1, head_dim, rows.shape[1]).mT, mode="r").R
    R = R * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None]  # QR leaves the signs open
    eye = torch.eye(head_dim, dtype=R.dtype, device=R.device).expand_as(R)
    inverses = torch.linalg.solve_triangular(R, eye, upper=True)
    regular = inverses.abs().amax((1, 2)) * R.abs().amax((1, 2)) < SINGULAR  # also false for infinities
    return torch.where(regular[:, None, None], inverses, eye)


@checked
def clover(params: CLOVERParams, W: Frozen, x: Float[Tensor, "*b i"], *, core: str = "qr") -> Float[Tensor, "*b o"]:
    """Return `y_h + D_h^T y_h` for the heads of `y = W x + b`. The module's docstring has the formula and the shapes."""
    D = params["dR"]
    if core == "qr":
        R_inv = W.constants["R_inv"] if W.constants else qr_cores(W, D.shape[-1])
        with full_precision(x):
            D = R_inv @ D.to(R_inv.dtype)
    y = W(x)
    heads = y.reshape(-1, len(D), D.shape[-1]).transpose(0, 1)  # (H, tokens, h)
    return y + torch.bmm(heads, D.to(y.dtype)).transpose(0, 1).reshape(y.shape)


@dataclass(frozen=True, kw_only=True)
class CLOVERConfig(AdapterConfig):
    """Config of CLOVER.

    Args:
        head_dim: width of a head, a divisor of `o`. Other layers are cut into blocks of this width; the paper's up projections of 64.
        core: `"qr"` for the paper's coordinates, `"free"` for none.
    """

    name = "clover"
    uses = frozenset({"output", "dense"})
    trained = "o * head_dim"
    macs = "o * head_dim"

    head_dim: Size = 64
    core: Literal["qr", "free"] = "qr"

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_divisor(self, "head_dim", W.out_features, "o")
        if self.core == "free":
            return {}
        inputs = W.in_features + (W.bias is not None)
        expect(self, "head_dim", self.head_dim <= inputs, f"at most {inputs}, the inputs of the layer", 'Use core="free".')
        return {"R_inv": qr_cores(W, self.head_dim)}

    def init(self, W: Frozen, generator: torch.Generator) -> CLOVERParams:
        h = self.head_dim
        return {"dR": torch.zeros(W.out_features // h, h, h)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return clover(params, W, x, core=self.core)
