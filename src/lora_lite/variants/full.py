r"""Full: all parameters of a module, trained as displacements.

$$y = f(x;\, \theta + d)$$

`f` is the module itself, of any class: a new head, an embedding, a norm, a linear layer. On a linear layer `y = (W + dW) x + b + db`.

Identity at init: exact, since `d = 0`.

Paper: none; the usual fine-tuning, here of named modules. Howard, Ruder, *Universal Language Model Fine-tuning for Text Classification*,
2018, arXiv:1801.06146, is where training a new head first was made a practice.

| tensor | shape | trained | init |
|---|---|---|---|
| one for each parameter of the module, by its name | as the parameter | yes | zeros |

Trained per target: as many numbers as the module has. Modules must be named by `target_names`; of modules inside one another the outermost
is taken, and nothing is excluded by default. Needs parameters of a floating dtype: a quantised layer has none.

Departures: PEFT's `modules_to_save` trains a copy; a displacement keeps weight decay meaningful, since zero is the model as it was. Params
are kept in float32 and the sum is rounded to the module's own dtype, as with master weights in mixed precision. Where the module shares its
weight with another (an output head tied to the embedding), this one alone moves, as in PEFT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, checked


@checked
def full(params: Params, W: Frozen, x: Tensor) -> Any:
    """Apply `W` with its parameters moved by `params` to `x`. The module's docstring has the formula."""
    return W.moved(params)(x)


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Config of full training, without hyperparameters of its own.

    Args:
        target_names: regular expressions that name modules, at least one.
        exclude_names: regular expressions of paths to leave alone; none by default.
    """

    name = "full"
    adapts = "module"
    uses = frozenset({"output"})
    macs = "0"

    exclude_names: str | Sequence[str] = ()

    def init(self, W: Frozen, generator: torch.Generator) -> Params:
        return {name: torch.zeros(p.shape) for name, p in W.parameters.items()}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Any:
        return full(params, W, x)
