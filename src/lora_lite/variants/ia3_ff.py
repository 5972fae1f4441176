r"""IA3-FF: a gate on every input of a layer.

$$y = W ((1 + g) \odot x) + b$$

Meant for the input of the feed-forward down projection, where IA3's third gate sits; `IA3Config` gates outputs. The paper's own
setting is both in one build: `ll.build(model, [IA3Config(target_names=r"(k|v)_proj$"), IA3FFConfig(target_names=r"down_proj$")])`.

Identity at init: exact, since `g = 0`.

Paper: Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning*, 2022, arXiv:2205.05638, sec. 3.3.

| tensor | shape | trained | init |
|---|---|---|---|
| `g` | `(i,)` | yes | zeros |

Trained per target: `i`. Needs nothing of the weight but its output.

Departures: PEFT has one class for both gates and trains the gate itself; `g` is its deviation from one, as in IA3.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked, gate


class IA3FFParams(TypedDict):
    g: Float[Tensor, " i"]


@checked
def ia3_ff(params: IA3FFParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W ((1 + g) x) + b`. The module's docstring has the formula and the shapes."""
    return W(gate(x, params["g"]))


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """Config of IA3's input gate, which has no hyperparameters of its own."""

    name = "ia3_ff"
    uses = frozenset({"output", "vectors"})
    trained = "i"
    macs = "i"

    def init(self, W: Frozen, generator: torch.Generator) -> IA3FFParams:
        return {"g": torch.zeros(W.in_features)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return ia3_ff(params, W, x)
