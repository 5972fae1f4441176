r"""CLOVER: a full matrix for each attention head, in coordinates taken from the weights that meet there.

$$y_h = y^0_h + D_h^T y^0_h, \quad y^0 = W x + b \qquad \text{or, with } \texttt{core="vo"},\ \text{on the input:} \qquad
y = W (x + D x) + b, \quad (D x)_h = D_h x_h$$

`core="qr"`, one layer, `W_h` the rows of head `h` of its output:

$$D_h = R_h^{-1}\, dT_h, \qquad [W_h \,|\, b_h]^T = Q_h R_h$$

This is the paper's model `Q_h (R_h + dT_h)` without `Q_h`: the layer gives it. `core="free"` trains `D_h` itself, which reaches the same
functions without a look at the weight, in other coordinates for the optimiser.

`core="vo"`, on the output projection of attention, `W_h` the columns that read head `h` and `V_h` the rows of the value projection for it:

$$D_h = C_h^{-1}\, dT_h\, G_h^{-1}, \qquad W_h V_h = U S Z^T, \quad C_h = U^T W_h, \quad G_h = V_h Z, \quad C_h G_h = S$$

which is `U (S + dT_h) Z^T` between the two layers, the paper's joint model, since attention is linear in the values. The value projection
stays as it is. Heads of the output that share one of the values, as with grouped queries, have a matrix each. The value projection is read
once, at build.

Identity at init: exact, since `dT = 0`.

Paper: Meng, Tang, Jiang, Zhang, *CLOVER: Cross-Layer Orthogonal Vectors Pruning and Fine-Tuning*, 2024, arXiv:2411.17426, sec. 3, app. A.1
(1)-(4).

| tensor | shape | trained | init |
|---|---|---|---|
| `dT` | `(H, h, h)` | yes | zeros |
| `R_inv` (`"qr"`) | `(H, h, h)` | no | inverses of `R_h`, the diagonals of `R_h` positive |
| `C_inv`, `G_inv` (`"vo"`) | `(H, h, h)` | no | inverses of `C_h`, `G_h` |

with `h = head_dim` and `H = o / h` heads, or `i / h` with `"vo"`.

Trained per target: `o h`, or `i h` with `"vo"`. Needs the dense weight once, at init; nothing of it with `"free"`.

Departures: the official code overwrites the weights by the factors, in the model's dtype, which rounds the base; here they stay and the
core is an increment. The text calls the core singular values; its counts and its code train all of it. The text gives the key layer the QR
core, the code the query layer: `target_names` says which layers have one. With grouped queries the code gives up the joint core; here it is
on the output projection and stays. The joint core of queries and keys is left out: it is defined without rotary positions alone. The code
takes the head's width as hidden size by heads, which some models set apart: `head_dim` is a field. It drops entries of the base's output
before the core; there is no dropout here. A head whose rows depend on each other, such as one with a row of zeros, has no inverse; its
`D_h` is trained itself. `"vo"` is the paper's model where nothing but attention lies between the two layers: not with norms or gates there.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Constants,
    Frozen,
    Params,
    Size,
    add_block_product,
    checked,
    expect,
    full_precision,
    require_divisor,
)

SINGULAR = 1e6  # the condition number, about, beyond which float32 has no digits left


class CLOVERParams(TypedDict):
    dT: Float[Tensor, "H h h"]


def triangles(columns: Tensor) -> Tensor:
    """Compute `R (H, h, h)` of `Q R = columns (H, n, h)`, its diagonals not negative: QR itself leaves the signs open."""
    R = torch.linalg.qr(columns, mode="r").R
    return R * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None]


def inverse(R: Tensor, right: Tensor) -> Tensor:
    """Compute `R^{-1} right`, `(H, h, h)`, or the identity for a head whose `R` is singular."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device).expand_as(R)
    inverses = torch.linalg.solve_triangular(R, eye, upper=True)
    regular = inverses.abs().amax((1, 2)) * R.abs().amax((1, 2)) < SINGULAR  # also false for infinities
    return torch.where(regular[:, None, None], inverses @ right, eye)


def rows_of(W: Frozen) -> Tensor:
    """Return the weight `(o, i)` in at least float32."""
    return W.dense(torch.promote_types(W.dtype, torch.float32))


def qr_factors(W: Frozen, h: int) -> Constants:
    """Compute `R_inv` of the heads of a layer's output."""
    rows = rows_of(W)
    if W.bias is not None:
        rows = torch.cat([rows, W.bias.detach().to(rows)[:, None]], 1)
    R = triangles(rows.view(-1, h, rows.shape[1]).mT)
    return {"R_inv": inverse(R, torch.eye(h, dtype=R.dtype, device=R.device).expand_as(R))}


def joint_factors(W: Frozen, values: Frozen, h: int) -> Constants:
    """Compute `C_inv` and `G_inv` of an output projection and the value projection before it, by decompositions of `(h, h)` matrices."""
    V = rows_of(values)
    left = triangles(rows_of(W).view(W.out_features, -1, h).transpose(0, 1))  # W_h = Q left
    right = triangles(V.view(-1, h, V.shape[1]).mT).to(left)  # V_h^T = P right
    right = right.repeat_interleave(len(left) // len(right), 0)
    U, _, Zt = torch.linalg.svd(left @ right.mT)  # W_h V_h = Q (left right^T) P^T
    signs = Zt.gather(2, Zt.abs().argmax(2, keepdim=True)).sign()  # as truncated_svd fixes them
    return {"C_inv": inverse(left, U * signs.mT), "G_inv": inverse(right, (Zt * signs).mT).mT.contiguous()}


@checked
def clover(params: CLOVERParams, W: Frozen, x: Float[Tensor, "*b i"], *, core: str = "qr") -> Float[Tensor, "*b o"]:
    """Return `(1 + D^T)(W x + b)` by heads, or `W (1 + D) x + b` with `core="vo"`. The module's docstring has the formula."""
    dT = params["dT"]
    if core == "vo" and not W.constants:
        raise ValueError(
            'clover: expected W as a Frozen with the constants C_inv and G_inv for core="vo", found none. They depend on the values: take '
            "them from config.constants(W, generator, values), and pass Frozen(weight, bias, constants)."
        )
    factors = W.constants or (qr_factors(W, dT.shape[-1]) if core == "qr" else {})
    with full_precision(x):
        if core == "qr":
            dT = factors["R_inv"] @ dT.to(factors["R_inv"].dtype)
        elif core == "vo":
            dT = (factors["C_inv"] @ dT.to(factors["C_inv"].dtype) @ factors["G_inv"]).mT
    if core == "vo":
        return W(add_block_product(x, dT.to(x.dtype)))
    y = W(x)
    return add_block_product(y, dT.to(y.dtype))


@dataclass(frozen=True, kw_only=True)
class CLOVERConfig(AdapterConfig):
    """Config of CLOVER.

    Args:
        head_dim: width of a head, a divisor of `o`, or of `i` with `"vo"`. Layers outside attention are cut into blocks of this width; the
            paper's up projections of 64.
        core: `"qr"` for the paper's core of one layer, `"free"` for the same in no coordinates, `"vo"` for the one between the values and
            the output of attention, whose targets are output projections, e.g. `target_names=r"o_proj$"`.
        values: with `"vo"`, the name of the value projection beside the target.
    """

    name = "clover"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "(i if core == 'vo' else o) * head_dim"
    macs = "(i if core == 'vo' else o) * head_dim"

    head_dim: Size = 64
    core: Literal["qr", "free", "vo"] = "qr"
    values: str = "v_proj"

    def partner(self, path: str) -> str | None:
        return ".".join((*path.split(".")[:-1], self.values)) if self.core == "vo" else None

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        h, joint = self.head_dim, self.core == "vo"
        require_divisor(self, "head_dim", W.in_features if joint else W.out_features, "i" if joint else "o")
        if self.core == "free":
            return {}
        if not joint:
            inputs = W.in_features + (W.bias is not None)
            expect(self, "head_dim", h <= inputs, f"at most {inputs}, the inputs of the layer", 'Use core="free".')
            return qr_factors(W, h)
        ends = (W.out_features, stats.in_features)
        expect(self, "head_dim", h <= min(ends), f"at most {min(ends)}, the width of the hidden states", "Lower it.")
        fits = stats.out_features % h == 0 and W.in_features % stats.out_features == 0
        found = f"the name of a projection whose heads of {h} divide the {W.in_features} inputs, not of {stats.out_features} outputs"
        expect(self, "values", fits, found, "Set head_dim to the model's.")
        return joint_factors(W, stats, h)

    def init(self, W: Frozen, generator: torch.Generator) -> CLOVERParams:
        h = self.head_dim
        return {"dT": torch.zeros((W.in_features if self.core == "vo" else W.out_features) // h, h, h)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return clover(params, W, x, core=self.core)
