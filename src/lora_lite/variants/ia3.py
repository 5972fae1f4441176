r"""IA3: a gate on every output of a layer.

$$y = (1 + g) \odot (W x + b)$$

The bias is scaled too. Meant for the outputs of the key and value projections; `IA3FFConfig` gates inputs.

Identity at init: exact, since `g = 0`.

Paper: Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning*, 2022, arXiv:2205.05638, sec. 3.3.

| tensor | shape | trained | init |
|---|---|---|---|
| `g` | `(o,)` | yes | zeros |

Trained per target: `o`. Needs nothing of the weight but its output.

Departures: the paper and PEFT train the gate itself, with neutral value one; `g` is its deviation, so that zero is the base model,
weight decay pulls there and bfloat16 resolves small steps.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked, gate


class IA3Params(TypedDict):
    g: Float[Tensor, " o"]


@checked
def ia3(params: IA3Params, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `(1 + g) (W x + b)`. The module's docstring has the formula and the shapes."""
    return gate(W(x), params["g"])


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Config of IA3's output gate, which has no hyperparameters of its own."""

    name = "ia3"
    uses = frozenset({"output"})
    trained = "o"
    macs = "o"

    def init(self, W: Frozen, generator: torch.Generator) -> IA3Params:
        return {"g": torch.zeros(W.out_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return ia3(params, W, x)
