r"""OFT: blocks of the input are rotated before the frozen layer; in this input-centric form also known as OFTv2.

$$y = W\, \mathrm{diag}(R_1, \dots, R_n)^T x + b, \qquad x'_k = x_k R_k \ \text{(rows)}, \qquad Q_k = \mathrm{skew}(v_k)$$

$$\text{series: } R = (I + Q)(I + Q + \dots + Q^{N-2}), \qquad \text{exact: } R = (I - Q)(I + Q)^{-1}$$

**The two rotate in opposite directions**: the series is that of `(I + Q)(I - Q)^{-1}`, the transpose of the exact map. So it is in PEFT,
so it is here, and so the same numbers mean opposite rotations under the two settings; `cayley` is part of what a checkpoint means.

Identity at init: exact, since `v = 0`: what is computed is `x + x (R - I)`, and `R - I` is zero.

Paper: Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schoelkopf, *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*,
2023, arXiv:2306.07280, sec. 3.3; Qiu, Liu, Weller, Schoelkopf, *Orthogonal Finetuning Made Scalable*, 2025, arXiv:2506.19847,
eq. (2) and sec. 3.3.

| tensor | shape | trained | init |
|---|---|---|---|
| `v` | `(n, k (k-1) / 2)` | yes | zeros |

with `k = block_size`, and `n = i / k` blocks, or 1 with `block_share`; `v` holds the upper triangle of `Q` row by row.

Trained per target: `i (k-1) / 2`, or `k (k-1) / 2`. Needs nothing of the weight but its output.

The exact map is orthogonal to rounding. The series is not: it is `C (I - Q^(N-1))` with `C` orthogonal, off by `|Q|^(2N-2)` for even
`N` and `2 |Q|^(N-1)` for odd, so `N = 4` is nearer than the usual 5, at the same cost; none helps once `|Q|` reaches 1.

Departures: `block_size` must divide `i`; PEFT takes the nearest divisor in silence. COFT's bound is `project`, for the training loop to
apply after each step; PEFT overwrites the params within the forward. PEFT declares a dropout of blocks and does not apply it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Frozen,
    Params,
    Within,
    add_block_product,
    cayley_excess,
    checked,
    each_first,
    full_precision,
    require_divisor,
    skew,
)


class OFTParams(TypedDict):
    v: Float[Tensor, "n e"]


def excess_rotation(v: Tensor, size: int, cayley: str, terms: int) -> Tensor:
    """Compute `R - I`, `(n, size, size)`, in at least float32: a deviation from 1, which low precision keeps and `R` would not."""
    Q = skew(v.to(torch.promote_types(v.dtype, torch.float32)), size)
    if cayley == "exact":
        return cayley_excess(-Q)
    if terms == 2:
        return 2 * Q
    # 2 Q + 2 Q^2 + ... + 2 Q^(N-2) + Q^(N-1) by Horner in Q^2: N = 4 and 5 take two products, 6 and 7 three.
    square = torch.bmm(Q, Q)
    if terms > 3 and terms % 2:  # 3 terms are 4, as in PEFT
        tail = torch.add(square, Q, alpha=2)
        start = tail + square
    else:
        tail, start = Q, 2 * (Q + square)
    for _ in range(max(terms - 2, 2) // 2):
        tail = torch.baddbmm(start, square, tail)
    return tail


def project(v: Tensor, size: int, eps: float) -> Tensor:
    """Apply COFT's bound to `v`: each block with `|Q| > eps / sqrt(n)` is shrunk onto that Frobenius norm, eq. (4) of the first paper."""
    bound = eps / v.shape[0] ** 0.5
    square = 2 * v.square().sum(1, keepdim=True)  # each entry of v stands twice in Q
    return torch.where(square <= bound**2, v, v * (bound * square.clamp_min(bound**2).rsqrt()))  # the clamp keeps gradients finite


@checked
def oft(
    params: OFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, block_size: int, cayley: str = "series", terms: int = 5
) -> Float[Tensor, "*b o"]:
    """Return `W (R^T x) + b`. The module's docstring has the formula and the shapes. One row of `v` serves all blocks."""
    with full_precision(x):
        excess = each_first(lambda v: excess_rotation(v, block_size, cayley, terms), params["v"])
    excess = excess.to(x.dtype)
    if excess.shape[0] > 1:
        return W(add_block_product(x, excess))
    blocks = x.reshape(-1, block_size)  # one rotation for all
    return W((blocks + blocks @ excess[0]).view(x.shape))


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Config of OFT.

    Args:
        block_size: width of a rotated block, >= 2, a divisor of `i`.
        cayley: `"series"` or `"exact"`; the two rotate in opposite directions.
        terms: terms of the series as PEFT counts them, >= 2; 3 is the same as 4. Not used by `"exact"`.
        block_share: rotate all blocks alike.
    """

    name = "oft"
    uses = frozenset({"output", "vectors"})
    trained = "(block_size if block_share else i) * (block_size - 1) // 2"
    macs = "i * block_size"

    block_size: Annotated[int, Within(2)] = 32
    cayley: Literal["series", "exact"] = "series"
    terms: Annotated[int, Within(2)] = 5
    block_share: bool = False

    def init(self, W: Frozen, generator: torch.Generator) -> OFTParams:
        i, k = W.in_features, self.block_size
        require_divisor(self, "block_size", i, "i")
        return {"v": torch.zeros(1 if self.block_share else i // k, k * (k - 1) // 2)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return oft(params, W, x, block_size=self.block_size, cayley=self.cayley, terms=self.terms)
