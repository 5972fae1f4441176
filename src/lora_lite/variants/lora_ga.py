r"""LoRA-GA: LoRA that starts from the singular vectors of the weight's gradient.

$$y = W x + b + s\,(B A - B_0 A_0)\, x, \qquad s = \alpha / r$$

$$\partial L / \partial W = U S V^T, \quad A_0 = V_{1..r}^T, \quad B_0 = \frac{o^{1/4}}{\sqrt{\gamma}}\, U_{r+1..2r} S_{r+1..2r}$$

so that the first step of the pair moves `W` as closely as it can to where full training would. Trained are the increments
`dA = A - A_0` and `dB = B - B_0`, by PiSSA's function.

Identity at init: exact, since both increments are zero.

Paper: Wang, Yu, Li, *LoRA-GA: Low-Rank Adaptation with Gradient Approximation*, 2024, arXiv:2407.05000.

| tensor | shape | trained | init |
|---|---|---|---|
| `dA` | `(r, i)` | yes | zeros |
| `dB` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | right singular vectors of the gradient |
| `B0` | `(o, r)` | no | left ones, scaled |

Trained per target: `r (i + o)`. Needs nothing of the weight, and at build batches with a loss; a quantised base will do, since
the gradient is summed from inputs and gradients of outputs.

Departures: the paper and PEFT overwrite the weight with `W - s B_0 A_0`, which a checkpoint does not hold; here it stays, and `A_0` and
`B_0` are stored. The SVD is exact or within a computed bound; PEFT's is randomised.
The formulas are PEFT's by default (`recipe="peft"`); the authors' code
(`recipe="official"`) leaves out the singular values and scales `A` and `B` alike, `random` draws disjoint components, and `weight_svd` is
the mean of `sqrt(sigma / s)` over the weight's singular values. The gradient is a mean over batches in evaluation mode; PEFT takes it in
training mode.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lora_lite.core import Constants, Frozen, Gradient, Positive, another_start, expect, leading_svd
from lora_lite.variants.pissa import PiSSAConfig, pissa

lora_ga = another_start(pissa, "lora_ga", constants=("A0", "B0"))


def components(r: int, direction: str, disjoint: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the indices of the singular pairs that `A` and `B` take among the first `2 r`, `(r,)` each."""
    if direction == "random":
        drawn = torch.randperm(2 * r, generator=generator)
        return drawn[:r], drawn[r:] if disjoint else drawn[:r]
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    return {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (2 * first + 1, 2 * first)}[direction]


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(PiSSAConfig):
    """Config of LoRA-GA.

    Args:
        r: rank of the update, from 1 to half of the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0.
        direction: which singular pairs of the gradient `A` and `B` take: `"ArB2r"` the first `r` and the next `r`, `"A2rBr"` the reverse,
            `"ArBr"` every other one, `"random"`.
        scale_start: size of the start: `"stable"`, by `stable_gamma`; `"weight_svd"`, by the weight's singular values; `"gd_scale"`,
            divided by `alpha / r`; `"unit"`.
        stable_gamma: the larger, the smaller a stable start, > 0.
        recipe: `"peft"` or `"official"`, where the two differ.
    """

    name = "lora_ga"
    calibrated = True
    statistic = Gradient

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale_start: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: Positive = 16.0
    recipe: Literal["peft", "official"] = "peft"

    @property
    def uses(self) -> frozenset[str]:
        """The parts of a layer that the variant uses: the weight only for `scale_start="weight_svd"`."""
        return frozenset({"output", "vectors"} | ({"dense"} if self.scale_start == "weight_svd" else set()))

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        gradient = _require_gradient(W, stats)
        half, shape = min(gradient.shape) // 2, tuple(gradient.shape)
        expected = f"at most half of min(i, o) = {min(shape)} for a layer of shape {shape}, since A and B take {2 * self.r} singular pairs"
        expect(self, "r", self.r <= half, expected, "Lower r or leave the layer out.")
        U, S, Vh = leading_svd(gradient, 2 * self.r, self.svd, angle=1e-3)  # the vectors are all that matters
        official = self.recipe == "official"
        for_A, for_B = (index.to(U.device) for index in components(self.r, self.direction, official, generator))
        a, b = self._sizes(W, S[for_B])
        A0, B0 = a * Vh[for_A], b * U[:, for_B] * (1.0 if official else S[for_B])
        return {"A0": A0.to(W.dtype).contiguous(), "B0": B0.to(W.dtype).contiguous()}

    def _sizes(self, W: Frozen, S: Tensor) -> tuple[Any, Any]:
        """Compute the factors of `A0` and `B0`, by the singular values of the gradient that `B0` takes."""
        official = self.recipe == "official"
        if self.scale_start == "stable":
            size = W.out_features**0.25 / self.stable_gamma**0.5
            return (size if official else 1.0), size
        if self.scale_start == "gd_scale":
            return 1 / self.scale, 1 / self.scale
        if self.scale_start == "unit":
            return 1.0, 1.0
        sigma = torch.linalg.svdvals(W.dense().to(torch.promote_types(W.dtype, torch.float32)))[: self.r]
        if official:
            size = (sigma / self.scale).sqrt().mean()
            return size, size
        return 1.0, sigma[0] / S[0] if S[0] > 0 else 1.0


def _require_gradient(W: Frozen, stats: Any) -> Tensor:
    gradient = getattr(stats, "gradient", None)
    if not isinstance(gradient, Tensor) or gradient.shape != (W.out_features, W.in_features):
        found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else "none"
        raise ValueError(
            f"LoRAGAConfig: expected stats.gradient of shape {(W.out_features, W.in_features)}, found {found}. Use build(model, cfg, "
            "calibration=batches, loss=f), or pass stats=Gradient().add(x, dy)."
        )
    if not gradient.any():
        raise ValueError("LoRAGAConfig: expected a gradient that is not zero, found zero. Leave the layer out, or use other batches.")
    return gradient
