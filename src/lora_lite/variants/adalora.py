r"""AdaLoRA: a low-rank update as a singular value decomposition whose components are pruned while it trains.

$$y = W x + b + \frac{\alpha}{r_0 + 10^{-5}}\, B\, (E \odot (A\, \mathrm{drop}(x))), \qquad r_0 = \text{init\_r}$$

`update` is the method's other half, for the training loop to call after each optimiser's step with the params after it and the gradients
before it: it smooths each entry's sensitivity, scores each triplet `(E_j, A_j, B_j)`, and sets the `E_j` of the lowest to zero, by the
budget that a cubic schedule leaves. `orthogonality` is its term of the loss.

Identity at init: exact, since `E = 0`.

Paper: Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao, *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, 2023,
arXiv:2303.10512, eq. (3)-(11).

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(init_r, i)` | yes | Gaussian, std 0.02 |
| `B` | `(o, init_r)` | yes | Gaussian, std 0.02 |
| `E` | `(init_r,)` | yes | zeros |

Trained per target: `init_r (i + o + 1)`. Needs nothing of the weight but its output.

Departures: none from PEFT. As there and in the official code, the scale keeps `init_r` after pruning, masked entries go on receiving
gradients, and the orthogonality term is a mean of Frobenius norms, not the paper's sum of their squares; its weight is PEFT's 0.5, the
official 0.1. The first call of `update` is step 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core.checked import checked
from lora_lite.core.config import AdapterConfig, expect, expect_int, expect_number
from lora_lite.core.frozen import Constants, Frozen
from lora_lite.core.linalg import add_low_rank
from lora_lite.variants._allocation import allocate

AnyTree = Mapping[str, Mapping[str, Tensor]]
NAMES = {"A", "B", "E"}


class AdaLoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    E: Float[Tensor, " r"]


@checked
def adalora(params: AdaLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Give `W x + b + scale B (E (A drop(x)))`; the module's docstring has the formula and the shapes."""
    # E scales the rows of A, not the activations: these would be kept twice for the backward pass.
    h = W.project(x, params["A"] * params["E"][:, None], dropout)
    return add_low_rank(W(x), h, params["B"], scale)


def orthogonality(params: AnyTree) -> Tensor:
    """Give the mean over all `A` and `B` of `||P P^T - I||_F`, eq. (4) as PEFT has it; the loss takes `orth_reg_weight` of it."""
    norms = []
    for leaves in params.values():
        if set(leaves) == NAMES:
            for P in (leaves["A"], leaves["B"].t()):
                norms.append(torch.linalg.matrix_norm(P @ P.t() - torch.eye(P.shape[0], dtype=P.dtype, device=P.device)))
    return torch.stack(norms).mean()


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    """Config of AdaLoRA; the schedule has PEFT's names and defaults.

    Args:
        init_r: rank at the start, >= 1.
        target_r: mean rank that is left, from 1 to `init_r`.
        alpha: numerator of the scale, dimensionless.
        tinit: steps before pruning begins.
        tfinal: steps at the end in which the budget stays.
        deltaT: steps between prunings.
        beta1, beta2: smoothing of sensitivity and of its uncertainty, in [0, 1).
        orth_reg_weight: weight of `orthogonality` in the loss, >= 0; the loop adds it.
        total_step: steps of the whole training, > `tinit + tfinal`; needed by `update` alone.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name: ClassVar[str] = "adalora"
    trained: ClassVar[str | None] = "init_r * (i + o + 1)"
    macs: ClassVar[str | None] = "init_r * (i + o)"

    init_r: int = 12
    target_r: int = 8
    alpha: float = 8.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_int(self, "init_r", 1, "Set the rank at the start, e.g. init_r=12.")
        expect_int(self, "target_r", 1, "Set the mean rank to keep, e.g. target_r=8.")
        expect(self, "target_r", self.target_r <= self.init_r, f"at most init_r={self.init_r}", "Lower target_r or raise init_r.")
        expect_number(self, "alpha", 0.0, math.inf, "The update is scaled by alpha / init_r, e.g. alpha=8.")
        for field, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            expect_int(self, field, least, "Count optimiser steps.")
        for field in ("beta1", "beta2", "dropout"):
            expect_number(self, field, 0.0, 1.0, "Set a share, e.g. 0.85.")
        expect_number(self, "orth_reg_weight", 0.0, math.inf, "PEFT's default is 0.5.")
        if self.total_step is not None:
            expect_int(self, "total_step", 1, "Count the optimiser steps of the whole training.")
            enough = self.total_step > self.tinit + self.tfinal
            expect(self, "total_step", enough, f"more than tinit + tfinal = {self.tinit + self.tfinal}", "Lower one of the two.")

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / (init_r + 1e-5)`."""
        return self.alpha / (self.init_r + 1e-5)

    def init(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> tuple[AdaLoRAParams, Constants]:
        A = 0.02 * torch.randn(self.init_r, W.in_features, generator=generator, device=generator.device)
        B = 0.02 * torch.randn(W.out_features, self.init_r, generator=generator, device=generator.device)
        return {"A": A, "B": B, "E": torch.zeros(self.init_r)}, {}

    def forward(self, params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Tensor:
        return adalora(params, W, x, scale=self.scale, dropout=self.dropout)

    def steer(self, params: Mapping[str, Tensor], c: float | Tensor) -> dict[str, Tensor]:
        return {**params, "E": c * params["E"]}

    def update(self, params: AnyTree, grads: AnyTree, state: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Allocate the budget after an optimiser's step.

        Args:
            params: the tree after the step; targets of other variants are passed through.
            grads: the gradients that the step used.
            state: None at the first call, then what the last call returned.

        Returns:
            `(params, state)` with pruned `E` set to zero.

        Raises:
            ValueError: where the config has no `total_step`.
        """
        expect(self, "total_step", self.total_step is not None, "the number of optimiser steps", "The schedule ends by it.")
        return allocate(self, params, grads, state)
