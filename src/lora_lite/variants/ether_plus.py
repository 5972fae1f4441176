r"""ETHER+: in blocks, one direction of the input is replaced by another, and of the output likewise.

$$y = G' W G x + b, \qquad G = \mathrm{diag}(G_1, \dots, G_n), \quad G_k = I - \hat u_k \hat u_k^T + \hat v_k \hat v_k^T, \quad
\hat u = u / \lVert u \rVert$$

and `G'` the same on the output with vectors of its own. It is evaluated with `e = v_hat + u_hat` and `d = v_hat - u_hat` as
`x + (e (d^T x) + d (e^T x)) / 2`: every term carries an `e`, so nothing cancels.

Identity at init: exact, since `v = -u`, so `e = 0`. The gradient does not vanish there.

Paper: Bini, Roth, Akata, Khoreva, *ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections*, 2024, arXiv:2405.20271,
sec. 3.3, blocks sec. 3.4.

| tensor | shape | trained | init |
|---|---|---|---|
| `u`, `v` | `(n, i/n)` | yes | uniform within 1/sqrt(i/n), and `v = -u` |
| `u_out`, `v_out` (`sides="both"`) | `(n, o/n)` | yes | uniform within 1/sqrt(o/n), and `v_out = -u_out` |

Trained per target: `2 (i + o)`, or `2 i` with `sides="in"`. Needs nothing of the weight but its output.

`G_k` has the eigenvalues `1 + sin(phi)` and `1 - sin(phi)`, with `phi` the angle between `u` and `v`, and 1 otherwise. So `|G_k - I|` is
`sqrt(2) sin(phi)`, at most `sqrt(2)` (the paper's bound, 2, is not tight). `G_k` is orthogonal only at `phi = 0`; at a right angle the
direction `u` is lost and `v` doubled.

The params are directions, as in [ETHER](ether.md): switch weight decay off. A zero vector counts as none. Strength `c` moves `v_hat` to
`c v_hat - (1 - c) u_hat`: 0 is the base model, 1 the adapter; negative strengths turn the other way.

Departures: for more than one block the official code is not the paper's on the input side; see [ETHER](ether.md), which names its other
differences too. On fused query-key-value layers it swaps the pairs of the two sides. The paper's method has both sides; one side is its
ablation, weaker.
"""

from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Size, checked, full_precision, kaiming, require_divisor
from lora_lite.variants.ether import add_in_blocks, unit


class ETHERPlusParams(TypedDict):
    u: Float[Tensor, "n k"]
    v: Float[Tensor, "n k"]
    u_out: NotRequired[Float[Tensor, "n l"]]
    v_out: NotRequired[Float[Tensor, "n l"]]


def exchanged(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `G (x - bias) + bias`."""
    with full_precision(x):
        v, u = unit(torch.stack((v, u)))
        B = torch.stack((v + u, v - u), 1).to(x.dtype)  # (n, 2, k): e and d
    return add_in_blocks(x, B, 0.5, swap=True, bias=bias)


@checked
def ether_plus(params: ETHERPlusParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `G' W G x + b`, or `W G x + b` without `u_out` and `v_out`. The module's docstring has the formula and the shapes."""
    y = W(exchanged(x, params["u"], params["v"]))
    return exchanged(y, params["u_out"], params["v_out"], W.bias) if "u_out" in params else y


@dataclass(frozen=True, kw_only=True)
class ETHERPlusConfig(AdapterConfig):
    """Config of ETHER+.

    Args:
        n_blocks: number of blocks, >= 1, a divisor of the widths.
        sides: `"both"` for input and output, `"in"` for the input alone.
    """

    name = "ether_plus"
    uses = frozenset({"output", "vectors"})
    trained = "2 * (i + (o if sides == 'both' else 0))"
    macs = "4 * (i + (o if sides == 'both' else 0))"

    n_blocks: Size = 1
    sides: Literal["both", "in"] = "both"

    def init(self, W: Frozen, generator: torch.Generator) -> ETHERPlusParams:
        n = self.n_blocks
        require_divisor(self, "n_blocks", W.in_features, "i")
        u = kaiming(n, W.in_features // n, generator)
        if self.sides == "in":
            return {"u": u, "v": -u}
        require_divisor(self, "n_blocks", W.out_features, "o")
        out = kaiming(n, W.out_features // n, generator)
        return {"u": u, "v": -u, "u_out": out, "v_out": -out}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return ether_plus(params, W, x)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        start = {name: unit(p) for name, p in params.items()}
        moved = {v: c * start[v] - (1 - c) * start[u] for u, v in (("u", "v"), ("u_out", "v_out")) if v in start}
        return {name: p.to(params[name].dtype) for name, p in {**start, **moved}.items()}
