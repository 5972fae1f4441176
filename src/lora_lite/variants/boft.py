r"""BOFT: the input is rotated by a product of sparse butterfly factors before the frozen layer, and its outputs are scaled.

$$y = (1 + s) \odot (W R^T x) + b, \qquad R = F_m \cdots F_1, \qquad
F_j = P_j\, \mathrm{diag}(C_{j1}, \dots, C_{jn})\, P_j^T$$

$$C = (I - X)(I + X)^{-1}, \qquad X = \tfrac{1}{2} (Q - Q^T)$$

`F_1` rotates blocks of `k` neighbours. `F_j` divides the input into groups of `2^{j-1}` blocks, and each of its blocks joins `k / 2`
entries of a group's first half with the same entries of the second. So `m` factors mix `2^{m-1} k` inputs by `m k` numbers each. The
permutations are transposes of views, no matrix wider than a block is formed, and one batched solve makes the blocks of all factors.

Identity at init: exact, since `Q = 0` and `s = 0`: what is computed is `x + x (F - I)`, and `F - I` is zero.

Paper: Liu, Qiu, Feng, Xiu, Xue, Yu, Feng, Liu, Heo, Peng, Wen, Black, Weller, Schoelkopf, *Parameter-Efficient Orthogonal Finetuning via
Butterfly Factorization*, 2023, arXiv:2311.06243, sec. 4.

| tensor | shape | trained | init |
|---|---|---|---|
| `Q` | `(m, i/k, k, k)` | yes | zeros |
| `s` | `(o,)` | yes | zeros |

Trained per target: `m i k + o`. Needs nothing of the weight but its output.

Departures: `Q` is a whole matrix of which the skew part acts, as in PEFT. PEFT trains the scale itself; `s` is its deviation from 1. The
bias is not scaled, as in PEFT, which takes one factor where its CUDA kernel is not compiled; this takes `m` of them anywhere.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Count,
    Frozen,
    Params,
    Probability,
    Size,
    add_block_product,
    checked,
    expect,
    full_precision,
    gate,
    require_divisor,
)
from lora_lite.core.linalg import cayley_excess


class BOFTParams(TypedDict):
    Q: Float[Tensor, "m n k k"]
    s: Float[Tensor, " o"]


def spared(blocks: Tensor, dropout: float) -> Tensor:
    """Draw a one for each block `(m, n, 1, 1)`, and zeros for a share of those of one factor: there the rotation is left out."""
    m, n = blocks.shape[:2]
    factor = (torch.rand(1, device=blocks.device) * m).floor() == torch.arange(m, device=blocks.device)  # (m,)
    dropped = torch.rand(n, device=blocks.device).argsort() < int(dropout * n)
    return 1 - (factor[:, None] & dropped).to(blocks.dtype)[:, :, None, None]


def turned(x: Tensor, excess: Tensor, level: int) -> Tensor:
    """Return `x F` for `x (tokens, i)`, with `F - I` as blocks `(n, k, k)` in groups of `2^level`."""
    n, k = excess.shape[:2]
    if not level:
        return add_block_product(x, excess)
    halves = x.view(-1, n >> level, 2, 1 << level, k // 2)  # (tokens, groups, halves, blocks, k/2)
    blocks = halves.permute(1, 3, 0, 2, 4).reshape(n, -1, k)
    change = torch.bmm(blocks, excess).view(n >> level, 1 << level, -1, 2, k // 2)
    return torch.add(halves, change.permute(2, 0, 3, 1, 4)).reshape(x.shape)


@checked
def boft(params: BOFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, block_dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `(1 + s) (W R^T x) + b`. The module's docstring has the formula and the shapes."""
    with full_precision(x):
        Q = params["Q"]
        excess = cayley_excess((Q.mT - Q) / 2)
        if block_dropout and W.training:
            excess = excess * spared(excess, block_dropout)
        excess = excess.to(x.dtype)
    h = x.reshape(-1, x.shape[-1])
    for level in reversed(range(len(excess))):
        h = turned(h, excess[level], level)
    return gate(W(h.view(x.shape)), params["s"], W.bias)


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    """Config of BOFT.

    Args:
        block_size: width of a block, a divisor of `i`, or 0 where `block_num` is given; even with several factors.
        block_num: number of blocks of a factor, a divisor of `i`, or 0 where `block_size` is given.
        n_butterfly_factor: factors of the rotation, >= 1; the number of blocks is a multiple of `2^(n_butterfly_factor - 1)`.
        block_dropout: share of the blocks of one factor, drawn once a call, that do not rotate, in [0, 1), in training mode.
    """

    name = "boft"
    uses = frozenset({"output", "vectors"})
    trained = "n_butterfly_factor * i * (block_size or i // block_num) + o"
    macs = "n_butterfly_factor * i * (block_size or i // block_num) + o"

    block_size: Count = 4
    block_num: Count = 0
    n_butterfly_factor: Size = 1
    block_dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        either, both = self.block_size or self.block_num, self.block_size and self.block_num
        expect(self, "block_num", bool(either), "at least 1 with block_size=0", "Set one of the two, e.g. block_size=4.")
        expect(self, "block_num", not both, f"0 with block_size={self.block_size}", "Set one of the two to 0.")

    def init(self, W: Frozen, generator: torch.Generator) -> BOFTParams:
        i, m = W.in_features, self.n_butterfly_factor
        require_divisor(self, "block_size" if self.block_size else "block_num", i, "i")
        k = self.block_size or i // self.block_num
        n, most = i // k, 1
        while k % 2 == 0 and n % 2**most == 0:
            most += 1
        expect(self, "n_butterfly_factor", m <= most, f"at most {most} for {n} blocks of {k}", f"Use {most}, or other blocks.")
        return {"Q": torch.zeros(m, n, k, k), "s": torch.zeros(W.out_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return boft(params, W, x, block_dropout=self.block_dropout)
