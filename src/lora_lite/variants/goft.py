r"""GOFT: a tree of plane rotations before the frozen layer, one angle for every input but one.

$$y = W\, (D \odot R^T x) + b, \qquad R = P_L \cdots P_1, \quad L = \lceil \log_2 i \rceil$$

`P_l` rotates, with the stride `s = 2^(l-1)`, each pair of the inputs `2 s k` and `2 s k + s` by an angle of its own; an input without a
partner waits for the next level. There are `i - 1` pairs for every `i`. `R^T` begins with the coarsest level, and turns a pair by

$$x_a' = \cos\theta\, x_a + \sin\theta\, x_b, \qquad x_b' = \cos\theta\, x_b - \sin\theta\, x_a$$

Level `l` meets only the multiples of its stride, so all levels together cost as much as one pass over `2 i` numbers. With many tokens the
finest levels are multiplied out first, to small blocks: more multiply-adds than are declared here, and fewer passes. `D` is there with
`norms`; without, `R` keeps the length of every input to rounding.

Identity at init: exact, since all angles are zero: what is added to a pair is `(cos - 1) x_a + sin x_b`, and both factors are zero.

Paper: Ma, Chu, Yang, Lin, Gao, Zhao, *Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation*, 2024, arXiv:2404.04316, eq.
(1)-(4), norms (6), algorithm app. C.

| tensor | shape | trained | init |
|---|---|---|---|
| `p` | `(i - 1,)` | yes | zeros |
| `d` (`norms`) | `(i,)` | yes | zeros, `D = 1 + d` |

The pairs of `p` stand level by level from stride 1, in each by ascending `k`, as in the official files.

Trained per target: `i - 1`, or `2 i - 1`. Needs nothing of the weight but its output.

The tree turns any one vector into any other of its length, which is what the paper proves. It is not every rotation: those have
`i (i-1) / 2` dimensions. The first input meets all others and half of the inputs meet one other each, so results depend on the order of the
inputs.

Departures: the angle is `p` itself as in the paper; the official code takes `pi tanh(p)`, which is `angle="tanh"`. `D` is off by default as
in the paper's GOFT; the official code has it on, which the paper calls GOFT*, and trains `D` itself; `d` is its deviation. The official
code's version of 2025 pairs each input with its neighbour on every level, whatever the stride. That is no orthogonal map and its merged
weights are not those of its forward; the pairs here are those of the paper and of the first version.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked, full_precision, gate


class GOFTParams(TypedDict):
    p: Float[Tensor, " e"]
    d: NotRequired[Float[Tensor, " i"]]


WIDEST = 16
"""Largest number of neighbouring inputs whose levels are one matrix, where there are more tokens than that; by measurement."""


def through_tree(x: Tensor, G: Tensor) -> Tensor:
    """Apply `x_a' = x_a + G_0 x_a + G_1 x_b` and `x_b' = x_b + G_2 x_a + G_3 x_b` to the pairs of the tree, the coarsest first.

    Args:
        x: inputs `(*b, i)`.
        G: `(4, i - 1)`, the pairs level by level from stride 1.
    """
    i, rows = x.shape[-1], x.reshape(-1, x.shape[-1])
    levels = list(G[..., None].split([(i + (1 << n) - 1) >> (n + 1) for n in range((i - 1).bit_length())], 1))
    k = math.gcd(i, WIDEST)
    if k < 4 or len(rows) <= WIDEST:
        # (i, tokens): strides over rows leave whole rows to copy and multiply
        return _through(rows.t().contiguous(), levels).t().contiguous().view(x.shape)  # W's product would round another layout otherwise
    fine, coarse = levels[: k.bit_length() - 1], levels[k.bit_length() - 1 :]
    # The finest levels stay inside blocks of k neighbours. Their product is made once, and one pass replaces one for each level.
    within = _through(torch.eye(k, dtype=x.dtype, device=x.device), [g.view(4, i // k, -1, 1) for g in fine])
    first, others = rows.view(-1, i // k, k).split([1, k - 1], -1)
    first = _through(first[..., 0].t().contiguous(), coarse).t()[..., None]
    blocks = torch.cat((first, others), -1).transpose(0, 1)  # (i/k, tokens, k)
    return (blocks @ within.mT).transpose(0, 1).reshape(x.shape)


def _through(rows: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Apply the pairs of `m` trees to `rows (i, n)`, level by level from the last. `levels` have the factors `(4, *m, pairs, 1)`."""
    done = rows[:1]  # the multiples of the stride so far
    for level, (aa, ab, ba, bb) in reversed(list(enumerate(levels))):
        b = rows[1 << level :: 2 << level]
        a, alone = done[..., : len(b), :], done[..., len(b) :, :]
        turned = torch.addcmul(torch.addcmul(a, a, aa), b, ab), torch.addcmul(torch.addcmul(b, b, bb), a, ba)
        pairs = torch.stack(turned, -2).flatten(-3, -2)
        done = torch.cat((pairs, alone), -2) if alone.shape[-2] else pairs
    return done


def excess_rotations(p: Tensor, angle: str) -> Tensor:
    """Compute `(cos - 1, sin, -sin, cos - 1)`, `(4, i - 1)`, in at least float32; `cos - 1` is `-2 sin^2` of the half angle."""
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    theta = math.pi * p.tanh() if angle == "tanh" else p
    sin, excess = theta.sin(), -2 * (0.5 * theta).sin().square()
    return torch.stack((excess, sin, -sin, excess))


@checked
def goft(params: GOFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, angle: str = "raw") -> Float[Tensor, "*b o"]:
    """Return `W (D R^T x) + b`, with `D = 1` where there is no `d`. The module's docstring has the formula and the shapes."""
    with full_precision(x):
        G = excess_rotations(params["p"], angle)
    turned = through_tree(x, G.to(x.dtype))
    return W(gate(turned, params["d"]) if "d" in params else turned)


@dataclass(frozen=True, kw_only=True)
class GOFTConfig(AdapterConfig):
    """Config of GOFT.

    Args:
        norms: train a factor for each input after the rotation: no longer orthogonal.
        angle: `"raw"` for the params as angles, in radians, `"tanh"` for angles `pi tanh(p)`.
    """

    name = "goft"
    uses = frozenset({"output", "vectors"})
    trained = "i - 1 + (i if norms else 0)"
    macs = "4 * (i - 1) + (i if norms else 0)"

    norms: bool = False
    angle: Literal["raw", "tanh"] = "raw"

    def init(self, W: Frozen, generator: torch.Generator) -> GOFTParams:
        params: GOFTParams = {"p": torch.zeros(W.in_features - 1)}
        return {**params, "d": torch.zeros(W.in_features)} if self.norms else params

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return goft(params, W, x, angle=self.angle)
