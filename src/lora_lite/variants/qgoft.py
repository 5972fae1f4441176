r"""qGOFT: a tree of free 2 x 2 maps before the frozen layer, kept near to rotations by a term of the loss.

$$y = W\, (D \odot R^T x) + b, \qquad (x_a', x_b')^T = G^T (x_a, x_b)^T, \quad G = I + dG$$

The pairs are those of [GOFT](goft.md), and `G` takes the place of each rotation. The loss adds `lambda` times `orthogonality(params)`, a
function of this module; the paper takes `lambda` from 1e-3 to 5e-2.

Identity at init: exact, since `dG = 0`.

Paper: Ma, Chu, Yang, Lin, Gao, Zhao, *Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation*, 2024, arXiv:2404.04316, eq.
(5), norms (6).

| tensor | shape | trained | init |
|---|---|---|---|
| `dG` | `(i - 1, 2, 2)` | yes | zeros |
| `d` (`norms`) | `(i,)` | yes | zeros, `D = 1 + d` |

Trained per target: `4 (i - 1)`, or `5 i - 4`. Needs nothing of the weight but its output.

Departures: `dG` and `d` are deviations from the identity, so that weight decay pulls to the base model; the official code trains `G`, which
decay would shrink to nothing. The paper's term of the loss is not in its code. It asks that the columns of `G` be orthogonal, not that they
have length one: lengths are free. The pairs are the paper's, as in [GOFT](goft.md), which says what the official code's versions do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked, gate
from lora_lite.core.tree import AnyTree, apart
from lora_lite.variants._tree import sizes, through_tree


class QGOFTParams(TypedDict):
    dG: Float[Tensor, "e 2 2"]
    d: NotRequired[Float[Tensor, " i"]]


def orthogonality(params: AnyTree) -> Tensor:
    """Sum over the pairs of all layers the squared product of the two columns of `G`, eq. (5)'s term: a scalar >= 0 for the loss."""
    terms = []
    for leaves in apart(params).values():
        if "dG" in leaves:
            G = leaves["dG"] + torch.eye(2, dtype=leaves["dG"].dtype, device=leaves["dG"].device)
            terms.append((G[..., 0] * G[..., 1]).sum(-1).square().sum())
    return torch.stack(terms).sum()


def maps(dG: Tensor) -> Tensor:
    """Return the entries 00, 10, 01 and 11 of `G = I + dG`, `(4, i - 1)`, in at least float32."""
    dG = dG.to(torch.promote_types(dG.dtype, torch.float32))
    return (dG + torch.eye(2, dtype=dG.dtype, device=dG.device)).transpose(1, 2).flatten(1).t()


@checked
def qgoft(params: QGOFTParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W (D R^T x) + b`, with `D = 1` where there is no `d`. The module's docstring has the formula and the shapes."""
    turned = through_tree(x, lambda: maps(params["dG"]))
    return W(gate(turned, params["d"]) if "d" in params else turned)


@dataclass(frozen=True, kw_only=True)
class QGOFTConfig(AdapterConfig):
    """Config of qGOFT.

    Args:
        norms: train a factor for each input after the tree.
    """

    name = "qgoft"
    uses = frozenset({"output", "vectors"})
    trained = "4 * (i - 1) + (i if norms else 0)"
    macs = "n * k * k + n * n + (i if norms else 0)"  # n blocks of k inputs, and the matrix between them

    norms: bool = False

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the number of blocks, `n`, and the inputs of each, `k`."""
        tree = sizes(i)
        return {"n": tree.n, "k": tree.k}

    def init(self, W: Frozen, generator: torch.Generator) -> QGOFTParams:
        params: QGOFTParams = {"dG": torch.zeros(W.in_features - 1, 2, 2)}
        return {**params, "d": torch.zeros(W.in_features)} if self.norms else params

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return qgoft(params, W, x)
