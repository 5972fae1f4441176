r"""GLoRA: a weight and a bias that are scaled and shifted, each by a path of its own size.

$$y = (W + W \odot A + B)\, x + b + b \odot D + E + W C$$

`A` and `B` are low-rank matrices, a number for each output, or one number; `C` is a vector for the inputs, in factors or whole; `D` and `E`
are vectors for the outputs or one number. Any of them may be left out. `C`, `D` and `E` are there where the layer has a bias.

Identity at init: exact, since one factor of each path, or the path, is 0.

Paper: Chavan, Liu, Gupta, Xing, Shen, *One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning*, 2023, arXiv:2306.07967.

| tensor | shape | trained | init |
|---|---|---|---|
| `Ad`, `Bd`; `Au`, `Bu`, with `config_A_B="lora"` | `(o, r)`; `(r, i)` | yes | zeros; uniform within 1/sqrt(i) |
| `A`, `B`, with `"vector"` or `"constant"` | `(o,)` or `(1,)` | yes | zeros |
| `Cd`; `Cu`, with `config_C="lora"` | `(i, r)`; `(r,)` | yes | zeros; uniform within 1 |
| `C`, with `"vector"` | `(i,)` | yes | zeros |
| `D`, `E`, with `config_D_E="vector"` or `"constant"` | `(o,)` or `(1,)` | yes | zeros |

Trained per target: `2 r (i + o)`, and with a bias `r (i + 1) + 2`, by default. `"lora"` for `A` and `B` reads the dense weight in each
forward and builds an update of its size. The other paths need the layer's output, and for `C` one more product with `W` in a call, of a
single vector.

Departures: none from PEFT. The paper searches for the size of each path in each layer; here a config states it for its layers.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Rank, checked, expect, gate, kaiming


class GLoRAParams(TypedDict):
    Ad: NotRequired[Float[Tensor, "o r"]]
    Au: NotRequired[Float[Tensor, "r i"]]
    A: NotRequired[Float[Tensor, " #o"]]
    Bd: NotRequired[Float[Tensor, "o r"]]
    Bu: NotRequired[Float[Tensor, "r i"]]
    B: NotRequired[Float[Tensor, " #o"]]
    Cd: NotRequired[Float[Tensor, "i r"]]
    Cu: NotRequired[Float[Tensor, " r"]]
    C: NotRequired[Float[Tensor, " i"]]
    D: NotRequired[Float[Tensor, " #o"]]
    E: NotRequired[Float[Tensor, " #o"]]


def bias_shift(params: GLoRAParams, W: Frozen) -> Tensor | None:
    """Compute `b D + E + W C`, or None without these paths."""
    terms = []
    if "D" in params and W.bias is not None:
        terms.append(params["D"] * W.bias + params["E"])
    if "C" in params or "Cd" in params:
        C = params["C"] if "C" in params else params["Cd"] @ params["Cu"]
        terms.append(W.matmul(C[None])[0])
    return sum(terms[1:], terms[0]) if terms else None


@checked
def glora(params: GLoRAParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `(W + W * A + B) x + b + b * D + E + W C`. The module's docstring has the formula and the shapes."""
    if "Ad" in params:
        scaled = W.dense(x.dtype) * (params["Ad"] @ params["Au"])
        y = W.updated(x, torch.addmm(scaled, params["Bd"], params["Bu"]))
    elif "A" in params:
        y = gate(W(x), params["A"], W.bias)
        y = torch.addcmul(y, x.sum(-1, keepdim=True).to(y.dtype), params["B"].to(y.dtype))
    else:
        y = W(x)
    shift = bias_shift(params, W)
    return y if shift is None else y + shift.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig(AdapterConfig):
    """Config of GLoRA.

    Args:
        r: rank of the paths that are `"lora"`, >= 1.
        config_A_B: the path of the weight's scale and shift: `"lora"`, `"vector"`, `"constant"` or `"none"`.
        config_C: the path of the shift by the weight: `"lora"`, `"vector"` or `"none"`.
        config_D_E: the path of the bias's scale and shift: `"vector"`, `"constant"` or `"none"`.
    """

    name = "glora"
    steered = ("Ad", "A", "Bd", "B", "Cd", "C", "D", "E")  # the update is linear in them together
    trained = "of_weight + (of_bias if biased else 0)"
    macs = "2 * o if config_A_B in ('vector', 'constant') else 0"  # the dense form is paid for once a call

    r: Rank = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the numbers of the weight's paths and of the bias's."""
        r = self.r
        of_C = {"lora": r * (i + 1), "vector": i, "none": 0}[self.config_C]
        of_D_E = {"vector": 2 * o, "constant": 2, "none": 0}[self.config_D_E]
        of_weight = {"lora": 2 * r * (i + o), "vector": 2 * o, "constant": 2, "none": 0}[self.config_A_B]
        return {"of_weight": of_weight, "of_bias": of_C + of_D_E}

    def __post_init__(self) -> None:
        super().__post_init__()
        some = {self.config_A_B, self.config_C, self.config_D_E} != {"none"}
        expect(self, "config_A_B", some, 'another than "none" where config_C and config_D_E are "none"', "Train one of the paths at least.")

    @property
    def uses(self) -> Set[str]:
        """The parts of a layer that the variant uses: the weight only for low-rank `A` and `B`, products of its own only for `C`."""
        of_C = set() if self.config_C == "none" else {"matmul"}
        return frozenset({"output", "vectors"} | of_C | ({"dense"} if self.config_A_B == "lora" else set()))

    def init(self, W: Frozen, generator: torch.Generator) -> Params:
        i, o, r = W.in_features, W.out_features, self.r
        sizes = {"vector": o, "constant": 1}
        params: dict[str, Tensor] = {}
        for name in "AB":
            if self.config_A_B == "lora":
                params |= {f"{name}d": torch.zeros(o, r), f"{name}u": kaiming(r, i, generator)}
            elif self.config_A_B != "none":
                params[name] = torch.zeros(sizes[self.config_A_B])
        if W.bias is not None and self.config_C != "none":
            factors = {"Cd": torch.zeros(i, r), "Cu": kaiming(r, 1, generator).flatten()}
            params |= factors if self.config_C == "lora" else {"C": torch.zeros(i)}
        if W.bias is not None and self.config_D_E != "none":
            params |= {name: torch.zeros(sizes[self.config_D_E]) for name in "DE"}
        expect(self, "config_A_B", bool(params), "a path that this layer has: it has no bias", 'Use "vector" or leave the layer out.')
        return params

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return glora(params, W, x)
