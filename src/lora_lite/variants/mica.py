r"""MiCA: LoRA whose output factor is frozen on the weight's minor singular directions.

$$y = W x + b + s\, B A\, \mathrm{drop}(x), \qquad W = U S V^T, \quad B = U_{[-r:]}, \quad s = \alpha / r \text{ or } \alpha / \sqrt{r}$$

`B` holds the left singular vectors of the `r` smallest singular values: what is learnt is written where the weight writes least.

Identity at init: exact, since `A = 0`.

Paper: Rüdiger, Raschka, *MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning*, 2026, arXiv:2604.01694.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | zeros |
| `B` | `(o, r)` | no | `U_{[-r:]}` |

Trained per target: `r i`. Needs the dense weight once, at init.

Departures: signs are fixed as in every SVD here; PEFT's are those of its library. `alpha` defaults to 16, twice PEFT's.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Constants, Frozen, Params, checked, require_rank, smallest_components
from lora_lite.variants.lora import LowRankConfig


class MiCAParams(TypedDict):
    A: Float[Tensor, "r i"]


def minor_directions(W: Frozen, r: int) -> Constants:
    """Compute `B (o, r)`, the left singular vectors of the `r` smallest singular values of the weight."""
    weight = W.dense()
    return {"B": smallest_components(weight, r)[0].to(weight.dtype)}


@checked
def mica(params: MiCAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale B A drop(x)`. The module's docstring has the formula and the shapes."""
    A = params["A"]
    basis = W.constants or minor_directions(W, A.shape[0])
    return W.updated_low_rank(x, (A, basis["B"].to(x.dtype)), scale, dropout)


@dataclass(frozen=True, kw_only=True)
class MiCAConfig(LowRankConfig):
    """Config of MiCA: the fields of LoRA, with the same meanings.

    Args:
        r: number of minor directions, from 1 to the smaller width of the layer.
    """

    name = "mica"
    uses = frozenset({"output", "project", "dense"})
    steered = ("A",)
    trained = "r * i"

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        return minor_directions(W, self.r)

    def init(self, W: Frozen, generator: torch.Generator) -> MiCAParams:
        return {"A": torch.zeros(self.r, W.in_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return mica(params, W, x, scale=self.scale, dropout=self.dropout)
