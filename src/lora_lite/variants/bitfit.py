r"""BitFit: a trained shift of every output of a layer.

$$y = W x + b + db$$

A layer without a bias gets one.

Identity at init: exact, since `db = 0`.

Paper: Ben Zaken, Ravfogel, Goldberg, *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models*, 2021, arXiv:2106.10199, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `db` | `(o,)` | yes | zeros |

Trained per target: `o`. Needs nothing of the weight but its output.

Departures: the paper and PEFT train the model's own biases in place, so that a layer without one is left out; `db` is the bias's
displacement, for every targeted layer. The paper also trains the biases of the norms, which are no targets here.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked


class BitFitParams(TypedDict):
    db: Float[Tensor, " o"]


@checked
def bitfit(params: BitFitParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + db`. The module's docstring has the formula and the shapes."""
    y = W(x)
    return y + params["db"].to(y.dtype)  # under autocast the layer's output has another dtype than its input


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Config of BitFit, which has no hyperparameters of its own."""

    name = "bitfit"
    uses = frozenset({"output"})
    trained = "o"
    macs = "0"

    def init(self, W: Frozen, generator: torch.Generator) -> BitFitParams:
        return {"db": torch.zeros(W.out_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return bitfit(params, W, x)
