r"""GOFT: a tree of plane rotations before the frozen layer, one angle for every input but one.

$$y = W\, (D \odot R^T x) + b, \qquad R = P_L \cdots P_1, \quad L = \lceil \log_2 i \rceil$$

`P_l` rotates, with the stride `s = 2^(l-1)`, each pair of the inputs `2 s k` and `2 s k + s` by an angle of its own; an input without a
partner waits for the next level. There are `i - 1` pairs for every `i`. `R^T` begins with the coarsest level, and turns a pair by

$$x_a' = \cos\theta\, x_a + \sin\theta\, x_b, \qquad x_b' = \cos\theta\, x_b - \sin\theta\, x_a$$

All levels are multiplied out first: the five finest to blocks of 32 inputs, the others to a matrix between the blocks. That takes two
products, where a pass for each level would take fewer multiply-adds, and longer. `D` is there with `norms`; without, `R` keeps the length
of every input to rounding.

Identity at init: exact, since all angles are zero, and the blocks identities.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked, gate
from lora_lite.variants._tree import sizes, through_tree


class GOFTParams(TypedDict):
    p: Float[Tensor, " e"]
    d: NotRequired[Float[Tensor, " i"]]


def rotations(p: Tensor, angle: str) -> Tensor:
    """Compute `(cos, sin, -sin, cos)`, `(4, i - 1)`, in at least float32."""
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    theta = math.pi * p.tanh() if angle == "tanh" else p
    sin, cos = theta.sin(), theta.cos()
    return torch.stack((cos, sin, -sin, cos))


@checked
def goft(params: GOFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, angle: str = "raw") -> Float[Tensor, "*b o"]:
    """Return `W (D R^T x) + b`, with `D = 1` where there is no `d`. The module's docstring has the formula and the shapes."""
    turned = through_tree(x, lambda: rotations(params["p"], angle))
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
    macs = "n * k * k + n * n + (i if norms else 0)"  # n blocks of k inputs, and the matrix between them

    norms: bool = False
    angle: Literal["raw", "tanh"] = "raw"

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the number of blocks, `n`, and the inputs of each, `k`."""
        tree = sizes(i)
        return {"n": tree.n, "k": tree.k}

    def init(self, W: Frozen, generator: torch.Generator) -> GOFTParams:
        params: GOFTParams = {"p": torch.zeros(W.in_features - 1)}
        return {**params, "d": torch.zeros(W.in_features)} if self.norms else params

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return goft(params, W, x, angle=self.angle)
