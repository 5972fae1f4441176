r"""EVA: LoRA whose `A` starts at the directions in which the layer's inputs vary most.

$$y = W x + b + s\, B A\, x, \qquad s = \alpha / r$$

$$A_0 = [v_1, \dots, v_r]^T, \quad \mathrm{Cov}(x)\, v_j = \lambda_j v_j, \quad \lambda_1 \ge \lambda_2 \ge \dots$$

Dropout and the rank-stabilised scale are LoRA's.

Identity at init: exact, since `B = 0`.

Paper: Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter, *Parameter Efficient Fine-tuning via Explained Variance
Adaptation*, 2024, arXiv:2410.07170.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | `A0` |
| `B` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | unit rows `v_j`, the largest entry of each positive |

Trained per target: `r (i + o)`. Needs nothing of the weight but its output, and at build the inputs of the layer. `A0` takes no part in
the forward: it is stored so that a loaded `adapt` can `init` again without data.

Departures: the covariance is summed in one pass over all data and decomposed once, where the paper and PEFT update a truncated SVD batch
by batch until it settles; the directions are those of the whole data. `A` is centred as in PEFT; `center=False` takes the second moment
instead, whose first direction is close to the mean. With `rho = 1`, the default here, every layer keeps the rank `r`; with `rho > 1` (2 in
PEFT) all directions of all layers compete by the share of their layer's variance that they explain, up to `rho r` a layer, for the same
number of ranks in all. A layer left without any is not adapted; the scale `alpha / r` stays. `whiten` divides a row once by the root of its
singular value in the data; PEFT divides again for each layer that shares the input, and counts the data as often as it is repeated until
the directions settle. Positions that are masked or, with `label_mask`, ignored by the loss are left out, as in PEFT.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Frozen, SVDConfig, Within, another_start, require_stats
from lora_lite.variants.lora import LoRAParams, LowRankConfig, lora

eva = another_start(lora, "eva")


def redistributed(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return for each layer the number of its directions among the `budget` best of all, by their shares of variance."""
    paths = list(shares)
    owners = torch.cat([torch.full((len(shares[path]),), k) for k, path in enumerate(paths)])
    order = torch.cat([shares[path].cpu() for path in paths]).argsort(descending=True, stable=True)
    counts = owners[order[:budget]].bincount(minlength=len(paths))
    return dict(zip(paths, counts.tolist()))


@dataclass(frozen=True, kw_only=True)
class EVAConfig(SVDConfig, LowRankConfig):
    """Config of EVA: the fields of LoRA, with the same meanings, and those of its start.

    Args:
        r: rank of the update, from 1 to the input width of the layer, and at most the number of calibration tokens.
        center: take directions about the mean of the inputs, else about zero.
        rho: how many times `r` a layer's rank may become where ranks are redistributed between layers, >= 1; 1 for rank `r` everywhere.
        whiten: divide each row by the square root of its singular value in the data; rows then shrink with the number of tokens.
        label_mask: leave out positions whose label is -100, where a batch has `labels` of the tokens' shape.
    """

    name = "eva"
    calibrated = True

    center: bool = True
    rho: Annotated[float, Within(1)] = 1.0
    whiten: bool = False
    label_mask: bool = True

    def allocate(self, stats: Mapping[str, Any]) -> Mapping[str, AdapterConfig]:
        if self.rho == 1:
            return super().allocate(stats)
        ranks = redistributed({path: self._shares(s) for path, s in stats.items()}, self.r * len(stats))
        configs = {r: self if r == self.r else self._of_rank(r) for r in set(ranks.values()) if r}
        return {path: configs[r] for path, r in ranks.items() if r}

    def _of_rank(self, r: int) -> "EVAConfig":
        return replace(self, r=r, alpha=self.scale * (math.sqrt(r) if self.rslora else r))  # the scale stays

    def _shares(self, stats: Any) -> Tensor:
        """Compute the shares of the variance that a layer's first directions explain, as many as it may get, descending."""
        moment = stats.covariance if self.center else stats.second_moment
        most = min(round(self.r * self.rho), len(moment), stats.count - self.center)
        variances, whole = stats.directions(most, self.center, self.svd)[0], moment.trace()
        return variances / whole if whole > 0 else torch.zeros_like(variances)  # constant inputs: no direction explains anything

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        moment = require_stats(self, W, stats, "covariance" if self.center else "second_moment")
        available = min(W.in_features, stats.count - self.center)  # the mean takes one
        if self.r > available:
            raise ValueError(
                f"EVAConfig.r: expected at most {available}, the directions that {stats.count} tokens span in a layer of input width "
                f"{W.in_features}, found {self.r}. Lower r or calibrate on more data."
            )
        variances, vectors = stats.directions(self.r, self.center, self.svd)
        A = vectors.t()
        A = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
        if self.whiten:
            least = variances[0].clamp_min(0) * torch.finfo(moment.dtype).eps * len(moment)
            if (found := int((variances > least).sum())) < self.r:
                raise ValueError(
                    f"EVAConfig.whiten: expected inputs that vary along r={self.r} directions, since each row is divided by its singular "
                    f"value, found {found} in a layer of input width {W.in_features}. Lower r, calibrate on more varied data, or leave "
                    "whiten out."
                )
            A = A / (variances[:, None] * stats.count) ** 0.25  # the singular value is sqrt(n variance)
        return {"A0": A.to(moment.dtype).contiguous()}

    def init(self, W: Frozen, generator: torch.Generator) -> LoRAParams:
        return {"A": W.constants["A0"].clone(), "B": torch.zeros(W.out_features, self.r)}
