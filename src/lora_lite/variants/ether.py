r"""ETHER: blocks of the input are reflected before the frozen layer, or blocks of the output after it.

$$y = W H x + b \quad \text{or} \quad y = H W x + b, \qquad H = \mathrm{diag}(H_1, \dots, H_n), \quad
H_k = I - 2\, u_k u_k^T / \lVert u_k \rVert^2$$

Identity at init: none. A reflection is the base model at no value of its params: it has determinant -1, and `|H - I|` is `2 sqrt(n)`
whatever `u` is. The start changes a weight without preferred directions by `2 sqrt(n / i)` of its norm. So `n_blocks` sets a strength,
though the number of params does not depend on it.

Paper: Bini, Roth, Akata, Khoreva, *ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections*, 2024, arXiv:2405.20271,
eq. (1)-(2), blocks sec. 3.4.

| tensor | shape | trained | init |
|---|---|---|---|
| `u` | `(n, i/n)`, or `(n, o/n)` with `side="out"` | yes | uniform within 1/sqrt(width of a block) |

Trained per target: `i`, or `o`. Needs nothing of the weight but its output.

The params are directions: the length of `u`, about 0.58 at init, sets how far a step turns it, and a step only lengthens it, since
gradients are orthogonal to it. Weight decay undoes that and pulls nowhere; switch it off. Squared lengths are held above 1e-6, so a zero
vector leaves its block as it is. Strength `c` shortens `u` to below that floor, where `u` is multiplied by `cos(pi c)`: 0 is the base
model, 1 and -1 the adapter, which is its own inverse.

Departures: for more than one block the official code cuts an input-side weight by a flat reshape, which reflects every block of the input
by one vector for each group of outputs. That is no transform of the input, and not what the paper says; here blocks are the paper's. The
official code reflects the outputs of fused query-key-value layers and the inputs of others; `side` says which. It drops entries of the
base's input too; there is no dropout here. `n_blocks` is 1 by default as in its scripts; the paper takes 32 on Llama-2-7B.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Size, add_low_rank, checked, full_precision, kaiming, require_divisor

FLOOR = 1e-6  # of squared norms


class ETHERParams(TypedDict):
    u: Float[Tensor, "n k"]


def unit(u: Tensor) -> Tensor:
    """Return the rows of `u` at length one, in at least float32. Rows of zeros stay zero."""
    return F.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=-1, eps=FLOOR**0.5)


def add_in_blocks(x: Tensor, B: Tensor, scale: float, swap: bool = False, bias: Tensor | None = None) -> Tensor:
    """Return `x + scale B'^T B (x - bias)` for the blocks of `x (*b, n k)`, with `B (n, m, k)`, and `B'` its rows in reverse if `swap`."""
    n, _, k = B.shape
    offset = None if bias is None else -torch.einsum("nk,nmk->nm", bias.to(B.dtype).view(n, k), B)
    if n == 1:
        h = F.linear(x, B[0], None if offset is None else offset[0])
        return add_low_rank(x, h.flip(-1) if swap else h, B[0].t(), scale)  # rows of B side by side: the quicker layout, both ways
    rows = x.reshape(-1, n, k)
    h = torch.bmm(rows.transpose(0, 1), B.mT)  # (n, tokens, m)
    h = h if offset is None else h + offset[:, None]
    return (rows + torch.bmm(scale * (h.flip(-1) if swap else h), B).transpose(0, 1)).reshape(x.shape)


@checked
def ether(params: ETHERParams, W: Frozen, x: Float[Tensor, "*b i"], *, side: str = "in") -> Float[Tensor, "*b o"]:
    """Return `W H x + b`, or `H W x + b` with `side="out"`. The module's docstring has the formula and the shapes."""
    with full_precision(x):
        u = unit(params["u"]).to(x.dtype)[:, None]  # (n, 1, k)
    return W(add_in_blocks(x, u, -2.0)) if side == "in" else add_in_blocks(W(x), u, -2.0, bias=W.bias)


@dataclass(frozen=True, kw_only=True)
class ETHERConfig(AdapterConfig):
    """Config of ETHER.

    Args:
        n_blocks: number of blocks, >= 1, a divisor of the width; each is reflected whole, so more blocks start further from the base model.
        side: `"in"` to reflect the layer's input, `"out"` its output without the bias.
    """

    name = "ether"
    uses = frozenset({"output", "vectors"})
    identity = None
    trained = "i if side == 'in' else o"
    macs = "2 * (i if side == 'in' else o)"

    n_blocks: Size = 1
    side: Literal["in", "out"] = "in"

    def init(self, W: Frozen, generator: torch.Generator) -> ETHERParams:
        width, letter = (W.in_features, "i") if self.side == "in" else (W.out_features, "o")
        require_divisor(self, "n_blocks", width, letter)
        return {"u": kaiming(self.n_blocks, width // self.n_blocks, generator)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return ether(params, W, x, side=self.side)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        quarter = 0.5 * math.pi * c
        length = FLOOR**0.5 * (quarter.sin() if isinstance(quarter, Tensor) else math.sin(quarter))
        return {"u": length * unit(params["u"]).to(params["u"].dtype)}
