r"""Lily: a low-rank update whose input factor a few layers share; a router mixes the output factor from experts that all layers share.

$$y = W x + b + s \sum_e \pi_e B_e\, A x, \qquad \pi = \mathrm{mean}_{x'} \, \mathrm{softmax}(R A x')$$

The mean is over all vectors `x'` of a call: every token of every row of the batch, padding too. All tokens have one update, and that of a
row depends on the others. Generation by single tokens has a mean of one token a step.

Layers share with those of the same name, such as `q_proj`, and the same shape: `B` all of them, `A` each `stride_A` in a row. The router
`R` is each layer's own.

Identity at init: exact, since `B = 0`. With `start="random"` there is none.

Paper: Zhong, Zhao, Zhou, *Low-Rank Interconnected Adaptation across Layers*, 2024, arXiv:2407.09946.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes, shared with `stride_A > 1` | uniform within 1/sqrt(i) |
| `B` | `(n, r, o)` | yes, shared | zeros |
| `router` | `(n, r)` | yes | uniform within 1/sqrt(r) |

Trained per target: `n r`, and `r i` where `stride_A = 1`; once for each group that shares it `r i` of `A`, and `n r o` of `B`. Needs
nothing of the weight but its output.

Departures: the softmax and its mean are in float32 at least. A call without a token, as of a routed expert that no token chose, has the
mean zero, where PEFT's is not a number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Rank, Size, add_low_rank, checked, kaiming
from lora_lite.core.config import patterns


class LilyParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "n r o"]
    router: Float[Tensor, "n r"]


@checked
def lily(params: LilyParams, W: Frozen, x: Float[Tensor, "*b i"], *, scaling: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scaling sum_e pi_e B_e A x`, with the shares `pi` of all vectors of `x` together."""
    h, B = W.project(x, params["A"]), params["B"]
    logits = F.linear(h, params["router"])
    chosen = logits.softmax(-1, dtype=torch.promote_types(h.dtype, torch.float32)).reshape(-1, len(B))
    shares = chosen.sum(0) / max(len(chosen), 1)  # the mean, and zero without a vector
    mixed = (shares.to(B.dtype) @ B.flatten(1)).view(B.shape[1:])  # (r, o)
    return add_low_rank(W(x), h, mixed.t(), scaling)


@dataclass(frozen=True, kw_only=True)
class LilyConfig(AdapterConfig):
    """Config of Lily.

    Args:
        r: rank of the update, >= 1; two to four times LoRA's, since fewer factors are trained.
        stride_A: how many layers of a group in a row share `A`, >= 1.
        num_B: number of experts that a group shares, `n`, >= 1; with 1 the router decides nothing.
        scaling: the factor of the update, dimensionless.
        groups: regular expressions, searched in a layer's path: layers share that the same one finds first. Empty for layers whose modules
            have the same name. Layers that none finds are of this sort too. Whatever their group, layers of different shapes share nothing.
        start: `"zero"` for the base model, or `"random"`, PEFT's `init_weights=False`.
    """

    name = "lily"
    uses = frozenset({"output", "project"})
    linear = False
    rowwise = False
    steered = ("B",)
    trained = "num_B * r + (0 if stride_A > 1 else r * i)"
    macs = "r * (i + o) + num_B * r"

    r: Rank = 32
    stride_A: Size = 1
    num_B: Size = 2
    scaling: float = 1.0
    groups: str | Sequence[str] = ()
    start: Literal["zero", "random"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", patterns(self, "groups"))

    @property
    def identity(self) -> float | None:
        """Exact with the start at zero."""
        return 0.0 if self.start == "zero" else None

    def group_of(self, path: str) -> str:
        """Return the expression that finds a layer, or else the name of its module."""
        found = next((pattern for pattern in self.groups if re.search(pattern, path)), None)
        return path.rpartition(".")[2] if found is None else f"/{found}/"

    def share_groups(self, layers: Mapping[str, Frozen]) -> Mapping[str, Mapping[str, str]]:
        members: dict[tuple[str, int, int], list[str]] = {}
        shared: dict[str, dict[str, str]] = {}
        for path, W in layers.items():
            group = members.setdefault((self.group_of(path), W.out_features, W.in_features), [])
            group.append(path)
            leader = group[(len(group) - 1) // self.stride_A * self.stride_A]
            shared[path] = {**({"A": leader} if self.stride_A > 1 else {}), "B": group[0]}
        return shared

    def init(self, W: Frozen, generator: torch.Generator) -> LilyParams:
        A, router = kaiming(self.r, W.in_features, generator), kaiming(self.num_B, self.r, generator)
        B = torch.zeros(self.num_B, self.r, W.out_features)
        if self.start == "random":  # PEFT's, as of one matrix (n r, o)
            B = kaiming(self.num_B * self.r, W.out_features, generator).view_as(B)
        return {"A": A, "B": B, "router": router}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return lily(params, W, x, scaling=self.scaling)
