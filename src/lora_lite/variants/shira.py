r"""SHiRA: a sparse update at places drawn once.

$$y = W x + b + S x, \qquad S_{k l} = s_{k l} \text{ at } r (i + o) \text{ places, and 0 elsewhere}$$

The update has as many trained numbers as LoRA's of rank `r`, and is of high rank.

Identity at init: exact, since `S = 0`.

Paper: Bhardwaj, Pandey, Priyadarshi, Ganapathy, Kadambi, Esteves, Borse, Whatmough, Garrepalli, van Baalen, Teague, Nagel, *Sparse High
Rank Adapters*, 2024, arXiv:2406.13175, sec. 3, its random mask.

| tensor | shape | trained | init |
|---|---|---|---|
| `s` | `(r (i + o),)` | yes | zeros |
| `indices` | `(2, r (i + o))` | no | rows and columns of random places, in the order of the weight |

Trained per target: `r (i + o)`. Needs nothing of the weight but its output. Where a weight has more than 512 entries for each place,
inputs are gathered and outputs scattered. Elsewhere `S` is built in each forward, a matrix of the weight's size, and a plain float32
linear layer takes one product with the sum.

Departures: the paper masks gradients of the weight itself, and has masks by magnitude and by gradients too; PEFT's files of any mask are
read. Without a `seed` the places come from the generator of `build`, which is seeded, where PEFT draws others in each run.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, Params, Rank, checked, expect
from lora_lite.variants._sparse import DENSE, places, plus_sparse


class SHiRAParams(TypedDict):
    s: Float[Tensor, " k"]


def mask(W: Frozen, count: int, generator: torch.Generator) -> Tensor:
    """Draw the rows and columns `(2, count)` of a random mask, as PEFT does from the same seed."""
    flat = places(W.out_features, W.in_features, count, generator).sort().values
    return torch.stack([flat // W.in_features, flat % W.in_features]).to(torch.int32)


@checked
def shira(params: SHiRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, seed: int = 0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + S x`. A plain weight takes places drawn from `seed`. The module's docstring has the formula and the shapes."""
    s = params["s"]
    indices = W.constants["indices"] if W.constants else mask(W, s.shape[0], torch.Generator().manual_seed(seed)).to(x.device)
    return plus_sparse(W, x, indices[0], indices[1], s)


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(AdapterConfig):
    """Config of SHiRA.

    Args:
        r: rank of the LoRA with as many trained numbers, >= 1.
        seed: of the places, the same for all layers, PEFT's `random_seed`; None for those of `build`'s own generator.
    """

    name = "shira"
    uses = frozenset({"output", "vectors"})
    trained = "r * (i + o)"
    macs = f"0 if i * o <= {DENSE} * r * (i + o) else r * (i + o)"  # the dense form is paid for once a call

    r: Rank = 32
    seed: Count | None = None

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        o, i = W.out_features, W.in_features
        fits = self.r * (i + o) <= i * o
        expect(self, "r", fits, f"at most {i * o // (i + o)} for a layer of shape ({o}, {i})", "Lower r or leave the layer out.")
        own = generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        return {"indices": mask(W, self.r * (i + o), own)}

    def init(self, W: Frozen, generator: torch.Generator) -> SHiRAParams:
        return {"s": torch.zeros(self.r * (W.in_features + W.out_features))}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return shira(params, W, x, seed=self.seed or 0)
