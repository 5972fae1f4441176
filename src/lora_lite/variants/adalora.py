r"""AdaLoRA: a low-rank update as a singular value decomposition whose components are pruned while it trains.

$$y = W x + b + \frac{\alpha}{r_0 + 10^{-5}}\, B\, (E \odot (A\, \mathrm{drop}(x))), \qquad r_0 = \mathrm{init\_r}$$

`update` is the method's other half, for the training loop to call after each optimiser's step with the params after it and the gradients
before it: it smooths each entry's sensitivity, scores each triplet `(E_j, A_j, B_j)`, and sets the `E_j` of the lowest to zero, by the
budget that a cubic schedule leaves. `lora_lite.variants.adalora.orthogonality` is its term of the loss; see [Training](../training.md).

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

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Count, Frozen, NonNegative, Params, Probability, Rank, Size, checked, expect
from lora_lite.core.errors import require_targets, require_tree
from lora_lite.core.tree import AnyTree, apart
from lora_lite.variants._allocation import allocate

NAMES = {"A", "B", "E"}


class AdaLoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    E: Float[Tensor, " r"]


@checked
def adalora(params: AdaLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale B (E (A drop(x)))`. The module's docstring has the formula and the shapes."""
    # E scales the rows of A, not the activations: these would be kept twice for the backward pass.
    return W.updated_low_rank(x, (params["A"], params["B"], params["E"]), scale, dropout)


def orthogonality(params: AnyTree) -> Tensor:
    """Compute the mean over all `A` and `B` of `||P P^T - I||_F`, eq. (4) as in PEFT. The loss adds `orth_reg_weight` of it."""
    require_tree("orthogonality(params)", "params", params)
    norms = []
    for leaves in apart(params).values():
        if set(leaves) == NAMES:
            for P in (leaves["A"], leaves["B"].mT):
                eye = torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
                norms.append(torch.linalg.matrix_norm(P @ P.mT - eye).flatten())
    require_targets("orthogonality", norms, "AdaLoRA")
    return torch.cat(norms).mean()


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    """Config of AdaLoRA. The schedule has PEFT's names and defaults.

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

    name = "adalora"
    uses = frozenset({"output", "project"})
    steered = ("E",)
    trained = "init_r * (i + o + 1)"
    macs = "init_r * (i + o)"

    init_r: Rank = 12
    target_r: Rank = 8
    alpha: NonNegative = 8.0
    tinit: Count = 0
    tfinal: Count = 0
    deltaT: Size = 1
    beta1: Probability = 0.85
    beta2: Probability = 0.85
    orth_reg_weight: NonNegative = 0.5
    total_step: Size | None = None
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "target_r", self.target_r <= self.init_r, f"at most init_r={self.init_r}", "Lower target_r or raise init_r.")
        around = self.tinit + self.tfinal
        enough = self.total_step is None or self.total_step > around
        expect(self, "total_step", enough, f"more than tinit + tfinal = {around}", "Lower one of the two.")

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / (init_r + 1e-5)`."""
        return self.alpha / (self.init_r + 1e-5)

    def init(self, W: Frozen, generator: torch.Generator) -> AdaLoRAParams:
        A = 0.02 * torch.randn(self.init_r, W.in_features, generator=generator, device=generator.device)
        B = 0.02 * torch.randn(W.out_features, self.init_r, generator=generator, device=generator.device)
        return {"A": A, "B": B, "E": torch.zeros(self.init_r)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return adalora(params, W, x, scale=self.scale, dropout=self.dropout)

    def update(self, params: AnyTree, grads: AnyTree, state: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Allocate the budget after an optimiser's step.

        Args:
            params: the tree of one adapter after the step; targets of other variants are passed through.
            grads: the gradients that the step used.
            state: None at the first call, then what the last call returned.

        Returns:
            `(params, state)` with pruned `E` set to zero, in new tensors. For an optimiser of torch's copy them into its leaves:
            `ll.tree_map(torch.Tensor.copy_, params, new)`.

        Raises:
            ValueError: where the config has no `total_step`, or params are stacked.
        """
        expect(self, "total_step", self.total_step is not None, "the number of optimiser steps", "The schedule ends by it.")
        return allocate(self, params, grads, state)
