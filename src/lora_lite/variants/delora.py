r"""DeLoRA: a low-rank update whose directions and strength are trained apart.

$$y = W x + b + \frac{\lambda}{r} \sum_j \frac{b_j a_j^T}{\lVert b_j \rVert \lVert a_j \rVert} (w \odot x), \qquad
\lambda = \lambda_0 + l, \quad w_c = \lVert W_{:,c} \rVert$$

with `a_j` the rows of `A` and `b_j` the columns of `B`: the update before `w` has Frobenius norm `lambda` at most. With `init="copy"` the
update at the start is taken off, `A = A_0 + dA`, `B = B_0 + dB`, and what is trained are the increments. Writing `a`, `b` for unit
vectors, the difference is evaluated as `b (a - a_0)^T + (b - b_0) a_0^T`, each increment of a unit vector without cancellation.

Identity at init: exact, since `B = 0`, or both increments are zero.

Paper: Bini, Girrbach, Akata, *Decoupling Angles and Strength in Low-rank Adaptation*, 2025, arXiv:2503.18225, eq. (5)-(9).

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | uniform within 1/sqrt(i); with `"copy"` zeros, an increment |
| `B` | `(o, r)` | yes | zeros; with `"copy"` an increment |
| `l` | `(1,)` | yes | zero |
| `w` | `(i,)` or `(1,)` | no | column norms of `W`, or its norm |
| `A0`, `B0` (`"copy"`) | as `A`, `B` | no | uniform within 1/sqrt(i), 1/sqrt(r) |

Trained per target: `r (i + o) + 1`. Needs the weight's column norms once.

`"zeros"` is PEFT's start. Norms are held above 1e-4, so a zero `B` is no division by zero, but its first step of any length jumps to a
full-size update, and its first gradient is 1e4 times too large. `"copy"` is the paper's, and the one to train with.

Departures: the paper and PEFT train `lambda` itself; `l` is its deviation, so that weight decay pulls to `lambda_0`, not to a dead layer.
As in the official code, the current `lambda` scales the part taken off too, so strength `c` scales `lambda`. The frozen copy is
drawn once per target, at build, so the seed of `init` changes nothing with `"copy"`. The paper writes `||W||`; the official code and PEFT
take the norm of each column, as does `w_norm="channel"`.
"""

from dataclasses import InitVar, dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Frozen, Params, Positive, Probability, Rank, add_low_rank, checked, kaiming

FLOOR = 1e-8  # of squared norms, as in PEFT


class DeLoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    l: Float[Tensor, "1"]  # noqa: E741


def weight_norm(W: Frozen, w_norm: str) -> Constants:
    """Compute the factor of the update, eq. (8), in at least float32: a norm for each input, one for all, or nothing."""
    if w_norm == "none":
        return {}
    weight = W.dense()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {"w": torch.linalg.vector_norm(weight, dim=0 if w_norm == "channel" else (0, 1), dtype=dtype).view(-1)}


def unit_step(start: Tensor, step: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Compute the unit vectors of `start` along `dim`, and the change that `step` makes in them, `(s + d) / |s + d| - s / |s|`.

    The second is exactly zero where `step` is, and keeps its digits where `step` is small: `|s + d| - |s|` is expanded, not subtracted.
    """
    square = start.square().sum(dim, keepdim=True).clamp_min(FLOOR)
    gain = (step * (2 * start + step)).sum(dim, keepdim=True)  # |s + d|^2 - |s|^2
    before, after = square.sqrt(), (square + gain).clamp_min(FLOOR).sqrt()
    unit = start / before
    return unit, (step - unit * (gain / (before + after))) / after


def factors(params: DeLoRAParams, constants: Params, lambda0: float) -> tuple[Tensor, Tensor]:
    """Compute the update's two factors, `(r, i)` and `(o, r)`, or `(2r, i)` and `(o, 2r)` over a frozen copy, in at least float32."""
    dtype = torch.promote_types(params["A"].dtype, torch.float32)
    A, B, l = (params[name].to(dtype) for name in ("A", "B", "l"))  # noqa: E741
    # lambda0 in the precision of l, so that l = -lambda0 is no update in bfloat16 too
    strength = (torch.full_like(params["l"], lambda0).to(dtype) + l) / A.shape[0]
    w = constants["w"].to(dtype) if "w" in constants else None
    if "A0" in constants:
        a, da = unit_step(constants["A0"].to(dtype), A, 1)
        b, db = unit_step(constants["B0"].to(dtype), B, 0)
        right, left = torch.cat([da, a]), torch.cat([b + db, db], dim=1) * strength
        return right if w is None else right * w, left
    squares = A.square().sum(1).clamp_min(FLOOR) * B.square().sum(0).clamp_min(FLOOR)
    return A if w is None else A * w, B * (strength * squares.rsqrt())


@checked
def delora(
    params: DeLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, lambda0: float, w_norm: str = "channel", dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + lambda/r sum_j b_j a_j^T (w x)`. The module's docstring has the formula and the shapes."""
    right, left = factors(params, W.constants or weight_norm(W, w_norm), lambda0)
    h = F.linear(W.dropped(x, dropout), right.to(x.dtype))
    return add_low_rank(W(x), h, left.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    """Config of DeLoRA.

    Args:
        r: rank of the update, >= 1.
        lambda0: strength at the start, dimensionless, > 0; with `w_norm="channel"` the update is at most this times the weight.
        init, start: `"zeros"` for PEFT's start, `"copy"` for the paper's; one option, kept as `start`, since `init` is the method.
        w_norm: what scales the update: `"channel"` each column's norm, `"scalar"` the weight's Frobenius norm, `"none"` nothing.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "delora"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "r * (i + o) + 1"
    macs = "(2 if start == 'copy' else 1) * r * (i + o)"

    r: Rank = 8
    lambda0: Positive = 15.0
    start: Literal["zeros", "copy"] = "zeros"
    w_norm: Literal["channel", "scalar", "none"] = "channel"
    dropout: Probability = 0.0
    init: InitVar[str]

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        copy: Constants = {}
        if self.start == "copy":
            copy = {"A0": kaiming(self.r, W.in_features, generator), "B0": kaiming(W.out_features, self.r, generator)}
        return weight_norm(W, self.w_norm) | copy

    def init(self, W: Frozen, generator: torch.Generator) -> DeLoRAParams:
        A = kaiming(self.r, W.in_features, generator) if self.start == "zeros" else torch.zeros(self.r, W.in_features)
        return {"A": A, "B": torch.zeros(W.out_features, self.r), "l": torch.zeros(1)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return delora(params, W, x, lambda0=self.lambda0, w_norm=self.w_norm, dropout=self.dropout)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        return {**params, "l": c * (self.lambda0 + params["l"]) - self.lambda0}  # the update is linear in lambda
