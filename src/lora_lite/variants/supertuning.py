r"""Super-Tuning: a sparse update at the entries of the weight that are largest, and Supra, which adds a low-rank one.

$$y = W x + b + S x + \tfrac{\alpha}{r}\, B\, (A\, \mathrm{drop}(x)), \qquad
S_{k l} = s_{k l} \text{ at the } (1 - \text{sparsity})\, i\, o \text{ largest } |W_{k l}|, \text{ and 0 elsewhere}$$

Without `r` there is no low-rank term. With `select_top=False` the smallest entries are trained.

Identity at init: exact, since `S = 0` and `B = 0`.

Paper: *Super-Tuning*, 2026, arXiv:2607.09287, its choice by magnitude. There the two are called Super and Supra.

| tensor | shape | trained | init |
|---|---|---|---|
| `s` | `(k,)` | yes | zeros |
| `A` | `(r, i)`, with `r` | yes | uniform within 1/sqrt(i) |
| `B` | `(o, r)`, with `r` | yes | zeros |
| `indices` | `(k,)` | no | places of the weight laid out flat, the first the largest |

Trained per target: `k = int(i o (1 - sparsity))`, and `r (i + o)` with `r`. Reads the dense weight once, at build. As with SHiRA, `S` is
built in each forward where one entry in 512 or more is trained, and otherwise inputs are gathered and outputs scattered.

Departures: none from PEFT, which has the paper's choice by magnitude, not that by activations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Frozen, NonNegative, Params, Probability, Rank, add_low_rank, checked, expect
from lora_lite.variants._sparse import DENSE, narrow, plus_flat


class SuperTuningParams(TypedDict):
    s: Float[Tensor, " k"]
    A: NotRequired[Float[Tensor, "r i"]]
    B: NotRequired[Float[Tensor, "o r"]]


@checked
def supertuning(
    params: SuperTuningParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float = 1.0, dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + S x + scale B (A drop(x))`, with the places among the constants. The module's docstring has the formula."""
    y = plus_flat(W, x, W.constants["indices"], params["s"])
    return add_low_rank(y, W.project(x, params["A"], dropout), params["B"], scale) if "A" in params else y


@dataclass(frozen=True, kw_only=True)
class SuperTuningConfig(AdapterConfig):
    """Config of Super-Tuning.

    Args:
        sparsity: share of the weight's entries that stay frozen, in [0, 1).
        select_top: whether the largest entries are trained, not the smallest.
        r: rank of the low-rank update beside, >= 1; None for none.
        alpha: numerator of its scale `alpha / r`, dimensionless; None for `2 r`.
        dropout: probability of dropping an entry of its input, in [0, 1), in training mode.
    """

    name = "supertuning"
    uses = frozenset({"output", "vectors", "project", "dense"})
    steered = ("s", "B")
    trained = "k + (r * (i + o) if r else 0)"
    macs = f"(0 if i * o <= {DENSE} * k else k) + (r * (i + o) if r else 0)"  # the dense form is paid for once a call

    sparsity: Probability = 0.99
    select_top: bool = True
    r: Rank | None = None
    alpha: NonNegative | None = None
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, off in (("alpha", None), ("dropout", 0)):
            alone = self.r is None and getattr(self, field) != off
            expect(self, field, not alone, f"{off} without r, since it is of the low-rank update", "Give it a rank, e.g. r=8.")

    @property
    def scale(self) -> float:
        """The factor of the low-rank update, `alpha / r`."""
        return 2.0 if self.alpha is None or self.r is None else self.alpha / self.r

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the number of trained entries, `k`."""
        return {"k": int(i * o * (1 - self.sparsity))}

    def constants(self, W: Frozen, generator: torch.Generator, stats: object = None) -> Constants:
        magnitude = W.dense().abs().flatten()
        count, fix = self.sizes(W.in_features, W.out_features)["k"], "Lower it or leave the layer out."
        expect(self, "sparsity", count > 0, f"at most {1 - 1 / magnitude.numel():.4g} for a layer of {magnitude.numel()} entries", fix)
        places = magnitude.topk(count, largest=self.select_top).indices
        return {"indices": narrow(places, magnitude.numel())}

    def init(self, W: Frozen, generator: torch.Generator) -> SuperTuningParams:
        sparse: SuperTuningParams = {"s": torch.zeros(W.constants["indices"].shape[0])}
        if self.r is None:
            return sparse
        A, B = W.low_rank_start(self.r, generator)
        return {**sparse, "A": A, "B": B}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return supertuning(params, W, x, scale=self.scale, dropout=self.dropout)
