r"""EVA: LoRA whose `A` starts at the directions in which the layer's inputs vary most.

$$y = W x + b + s\, B A\, x, \qquad s = \alpha / r$$

$$A_0 = [v_1, \dots, v_r]^T, \quad \mathrm{Cov}(x)\, v_j = \lambda_j v_j, \quad \lambda_1 \ge \lambda_2 \ge \dots$$

Identity at init: exact, since `B = 0`.

Paper: Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter, *Parameter Efficient Fine-tuning via Explained Variance
Adaptation*, 2024, arXiv:2410.07170.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | `A0` |
| `B` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | unit rows `v_j`, the largest entry of each positive |

Trained per target: `r (i + o)`. Needs nothing of the weight but its output, and at build the inputs of the layer. `A0` takes no part in
the forward: it is kept so that a loaded `adapt` can `init` again without data.

Departures: the covariance is summed in one pass over all data and decomposed once, where the paper and PEFT update a truncated SVD batch
by batch until it settles; the directions are those of the whole data. `A` is centred as in PEFT; `center=False` takes the second moment
instead, whose first direction is close to the mean. Every layer keeps the rank `r`: the paper's redistribution of ranks between layers
(`rho > 1`, PEFT's default is 2) is refused. `whiten` divides a row once
by the root of its singular value in the data; PEFT divides again for each layer that shares the input, and counts the data as often as it
is repeated until the directions settle. Positions that are masked or, with `label_mask`, ignored by the loss are left out, as in PEFT.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite._check import checked
from lora_lite.config import AdapterConfig, expect, expect_bool, expect_int, expect_number
from lora_lite.frozen import Constants, Frozen
from lora_lite.statistics import exact, require_stats
from lora_lite.variants.lora import LoRAParams, lora


@checked
def eva(params: LoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Give `W x + b + scale B A x`, LoRA's own function; the module's docstring has the start that makes it EVA."""
    return lora(params, W, x, scale=scale)


@dataclass(frozen=True, kw_only=True)
class EVAConfig(AdapterConfig):
    """Config of EVA.

    Args:
        r: rank of the update, from 1 to the input width of the layer, and at most the number of calibration tokens.
        alpha: numerator of the scale `alpha / r`, dimensionless.
        center: take directions about the mean of the inputs, else about zero.
        rho: redistribution of ranks between layers; only 1.0, every layer at rank `r`.
        whiten: divide each row by the square root of its singular value in the data; rows then shrink with the number of tokens.
        label_mask: leave out positions whose label is -100, where a batch has `labels` of the tokens' shape.
    """

    name: ClassVar[str] = "eva"
    calibrated: ClassVar[bool] = True
    trained: ClassVar[str | None] = "r * (i + o)"
    macs: ClassVar[str | None] = "r * (i + o)"

    r: int = 8
    alpha: float = 16.0
    center: bool = True
    rho: float = 1.0
    whiten: bool = False
    label_mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_int(self, "r", 1, "Set r to the rank of the update, e.g. r=8.")
        expect_number(self, "alpha", 0.0, math.inf, "The update is scaled by alpha / r, e.g. alpha=16.")
        expect(self, "rho", self.rho == 1, "1.0, the same rank in every layer", "Redistributing ranks is not supported; leave rho out.")
        for field in ("center", "whiten", "label_mask"):
            expect_bool(self, field)

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / r`."""
        return self.alpha / self.r

    def init(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> tuple[LoRAParams, Constants]:
        start = dict(W.constants) or {"A0": self._directions(W, stats)}
        return {"A": start["A0"].clone(), "B": torch.zeros(W.out_features, self.r, device=W.device)}, start

    def _directions(self, W: Frozen, stats: Any) -> Tensor:
        moment = require_stats(self, W, stats, "covariance" if self.center else "second_moment")
        available = min(W.in_features, stats.count - self.center)  # the mean takes one
        if self.r > available:
            raise ValueError(
                f"EVAConfig.r: expected at most {available}, the directions that {stats.count} tokens span in a layer of input width "
                f"{W.in_features}, found {self.r}. Lower r or calibrate on more data."
            )
        variances, vectors = torch.linalg.eigh(exact(moment))  # ascending
        A = vectors[:, -self.r :].flip(1).t()
        A = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
        if self.whiten:
            A = A / (variances[-self.r :].flip(0)[:, None] * stats.count) ** 0.25  # the singular value is sqrt(n variance)
        return A.to(moment.dtype).contiguous()

    def forward(self, params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Tensor:
        return eva(params, W, x, scale=self.scale)

    def steer(self, params: Mapping[str, Tensor], c: float | Tensor) -> dict[str, Tensor]:
        return {**params, "B": c * params["B"]}  # the update is linear in B; scaling A too would square c
