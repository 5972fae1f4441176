r"""TinyLoRA: a trained vector, of one layer or of many, that mixes fixed random matrices between singular vectors of the weight.

$$y = W x + b + B R A\, \mathrm{drop}(x), \qquad R = \sum_k v_k P_k, \qquad A = S_r^{1/2} V_r^T, \quad B = U_r S_r^{1/2}$$

Each layer has matrices `P` of its own. With `weight_tying` above 0 several layers in a row share a vector: there are
`round(L (1 - weight_tying))` of them for `L` layers, each for as many layers as any, the last one for the rest too.

Identity at init: exact, since `v = 0`. With `start="uniform"` there is none.

Paper: Morris, Mireshghallah, Ibrahim, Mahloujifar, *Learning to Reason in 13 Parameters*, 2026, arXiv:2602.04118.

| tensor | shape | trained | init |
|---|---|---|---|
| `v` | `(g, u)` | yes, shared | zeros, or uniform within `init_v_bound` |
| `A` | `(r, i)` | no | `S_r^(1/2) V_r^T` |
| `B` | `(o, r)` | no | `U_r S_r^(1/2)` |
| `P` | `(u, r, r)` | no | Gaussian, variance `1 / r`, from `seed` and the layer's number |
| `group` | `(1,)` | no | the row of `v` that is the layer's |

Trained per target: none of its own, and `g u` numbers for all `g` groups together. Needs the dense weight once, at init. Where a width is
smaller than `r`, the rank is that width.

Departures: signs of the singular vectors are fixed, by the largest entry of each row of `V_r^T` being positive. The paper leaves the
distribution of `P` open, and this one is PEFT's, as are the places of the singular values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    Constants,
    Count,
    Frozen,
    NonNegative,
    Params,
    Positive,
    Probability,
    Rank,
    Size,
    SVDConfig,
    Way,
    add_low_rank,
    balanced_factors,
    checked,
    expect,
)


class TinyLoRAParams(TypedDict):
    v: Float[Tensor, "g u"]


def factors(W: Frozen, r: int, svd: Way = "exact") -> Constants:
    """Compute `A (r, i)` and `B (o, r)`, which have the roots of the singular values each."""
    weight = W.dense()
    A, B = balanced_factors(weight, r, svd=svd)
    return {"A": A.to(weight.dtype), "B": B.to(weight.dtype)}


def numbered(W: Frozen, r: int, u: int, seed: int, number: int, group: int) -> Constants:
    """Draw the matrices `P (u, r, r)` of the layer of a number, as PEFT does, beside the row of `v` that is the layer's."""
    r = min(r, W.in_features, W.out_features)
    generator = torch.Generator().manual_seed(seed + number)
    P = torch.normal(0.0, 1 / r**0.5, (u, r, r), generator=generator, dtype=torch.float32, device="cpu")
    return {"P": P.to(W.device), "group": torch.tensor([group], device=W.device)}


@checked
def tinylora(
    params: TinyLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, r: int = 2, seed: int = 42, dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + B R A drop(x)`. A plain weight takes factors of its own, and the matrices of a first layer, drawn from `seed`."""
    v = params["v"]
    fixed = W.constants or {**factors(W, r), **numbered(W, r, v.shape[1], seed, 0, 0)}
    A, B, P = (fixed[name].to(x.dtype) for name in ("A", "B", "P"))
    R = (v.index_select(0, fixed["group"]) @ P.flatten(1)).view(P.shape[1:])
    return add_low_rank(W(x), F.linear(W.project(x, A, dropout), R), B)


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(SVDConfig):
    """Config of TinyLoRA.

    Args:
        r: number of singular directions, >= 1; the paper's choice is 2.
        u: length of a trained vector, >= 1.
        weight_tying: share of the vectors that are saved by sharing, in [0, 1]; with 1 there is one for all layers.
        seed: of the random matrices; PEFT's `projection_seed`.
        start: `"zeros"` for the base model, or `"uniform"`, PEFT's `init_weights="uniform"`.
        init_v_bound: bound of the uniform start, > 0.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "tinylora"
    uses = frozenset({"output", "project", "dense"})
    trained = "0"
    macs = "min(r, i, o) * (i + o) + min(r, i, o) ** 2"

    r: Rank = 2
    u: Size = 64
    weight_tying: NonNegative = 0.0
    seed: Count = 42
    start: Literal["zeros", "uniform"] = "zeros"
    init_v_bound: Positive = 0.02
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "weight_tying", self.weight_tying <= 1, "a share in [0, 1]", "Use 1 for one vector for all layers.")

    @property
    def identity(self) -> float | None:
        """Exact with the start at zeros."""
        return 0.0 if self.start == "zeros" else None

    def groups(self, layers: int) -> int:
        """Count the trained vectors for so many layers."""
        return max(1, round(layers * (1.0 - self.weight_tying)))

    def allot(self, layers: Mapping[str, Frozen]) -> Mapping[str, Constants]:
        groups = self.groups(len(layers))
        size = max(1, len(layers) // groups)
        return {path: numbered(W, self.r, self.u, self.seed, n, min(n // size, groups - 1)) for n, (path, W) in enumerate(layers.items())}

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        return factors(W, self.r, self.svd)

    def share_init(self, layers: Sequence[Frozen], generator: torch.Generator) -> TinyLoRAParams:
        v = torch.zeros(self.groups(len(layers)), self.u)
        return {"v": v if self.start == "zeros" else v.uniform_(-self.init_v_bound, self.init_v_bound, generator=generator)}

    def init(self, W: Frozen, generator: torch.Generator) -> Params:
        return {}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return tinylora(params, W, x, r=self.r, seed=self.seed, dropout=self.dropout)
