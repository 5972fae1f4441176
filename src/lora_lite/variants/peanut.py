r"""PEANuT: a low-rank update whose input factor is a small network's image of the weight itself.

$$y = W x + b + s\, B\, (H x), \qquad H = \sigma(A W)$$

With `depth` the network goes on, `d` square layers down and `d` up, each of the latter beside the one that it mirrors:

$$H_j = \sigma(E_j H_{j-1}), \qquad H \leftarrow \sigma(D_j H) + H_{d-j}, \quad j = 1 \dots d$$

`H (r, i)` is computed once in a call. The update is LoRA's then, and never a matrix of the weight's size.

Identity at init: exact, since `B = 0`.

Paper: Zhong, Jiang, Li, Nakada, Liu, Zhang, Yao, Wang, *PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers*, 2024,
arXiv:2410.01870.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, o)` | yes | uniform within 1/sqrt(o) |
| `B` | `(o, r)` | yes | zeros |
| `E`, `D` | `(depth, r, r)`, with `depth` | yes | uniform within 1/sqrt(r) |

Trained per target: `2 r (o + depth r)`. Reads the dense weight in each forward, in a product that costs as much as `r` tokens.

Departures: none from PEFT, which builds the update itself; of its activations, the functions that torch has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Count, Frozen, Params, Rank, checked, kaiming

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda h: h,
}


class PEANuTParams(TypedDict):
    A: Float[Tensor, "r o"]
    B: Float[Tensor, "o r"]
    E: NotRequired[Float[Tensor, "n r r"]]
    D: NotRequired[Float[Tensor, "n r r"]]


def tweaked(params: PEANuTParams, weight: Tensor, act_fn: str) -> Tensor:
    """Compute `H (r, i)`, the network's image of the weight `(o, i)`."""
    act = ACTIVATIONS[act_fn]
    h = act(params["A"] @ weight)
    down = []
    for E in params.get("E", ()):
        down.append(h)
        h = act(E @ h)
    for D in params.get("D", ()):
        h = act(D @ h) + down.pop()
    return h


@checked
def peanut(
    params: PEANuTParams, W: Frozen, x: Float[Tensor, "*b i"], *, act_fn: str = "relu", scaling: float = 1.0
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + s B (H x)`. The module's docstring has the formula and the shapes."""
    H = tweaked(params, W.dense(params["A"].dtype), act_fn)
    return W.updated_low_rank(x, (H, params["B"]), scaling)


@dataclass(frozen=True, kw_only=True)
class PEANuTConfig(AdapterConfig):
    """Config of PEANuT.

    Args:
        r: rank of the update and width of the network, >= 1.
        depth: number of square layers down, and up.
        act_fn: the activation, by transformers' name.
        scaling: the factor of the update, dimensionless.
    """

    name = "peanut"
    uses = frozenset({"output", "vectors", "dense"})
    steered = ("B",)
    trained = "2 * r * (o + depth * r)"
    macs = "r * (i + o)"

    r: Rank = 32
    depth: Count = 0
    act_fn: Literal[
        "relu", "gelu", "gelu_pytorch_tanh", "silu", "mish", "leaky_relu", "relu6", "hardswish", "tanh", "sigmoid", "linear"
    ] = "relu"
    scaling: float = 1.0

    def init(self, W: Frozen, generator: torch.Generator) -> PEANuTParams:
        o, r, n = W.out_features, self.r, self.depth
        ends: PEANuTParams = {"A": kaiming(r, o, generator), "B": torch.zeros(o, r)}
        if n == 0:
            return ends
        E, D = (kaiming(n * r, r, generator).view(n, r, r) for _ in range(2))
        return {**ends, "E": E, "D": D}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return peanut(params, W, x, act_fn=self.act_fn, scaling=self.scaling)
