r"""CorDA: LoRA that starts from the singular vectors of the weight times the covariance of its inputs.

$$y = W x + b + s\,(B A - B_0 A_0)\, x, \qquad s = \alpha / r$$

$$W C = U S V^T, \quad B_0 = U_k \sqrt{S_k / s}, \quad A_0 = \sqrt{S_k / s}\, V_k^T C^{-1}$$

`C` is the inputs' second moment plus 0.01 of its mean diagonal. `k` are the `r` largest singular values for the `ipm` mode (instruction
previewed: learn the task of the data) and the `r` smallest for `kpm` (knowledge preserved: keep what the data asks for). Trained are the
increments `dA = A - A_0` and `dB = B - B_0`, by PiSSA's function.

Identity at init: exact, since both increments are zero.

Paper: Yang, Li, Zhou, Song, Wu, Nie, Ghanem, *CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
Parameter-Efficient Fine-tuning*, 2024, arXiv:2406.05223.

| tensor | shape | trained | init |
|---|---|---|---|
| `dA` | `(r, i)` | yes | zeros |
| `dB` | `(o, r)` | yes | zeros |
| `A0` | `(r, i)` | no | `sqrt(S_k / s) V_k^T C^-1` |
| `B0` | `(o, r)` | no | `U_k sqrt(S_k / s)` |

Trained per target: `r (i + o)`. Needs the dense weight once, at init, and at build the inputs of the layer.

Departures: the paper and PEFT overwrite the weight with `W - s B_0 A_0`; here it stays. `V^T C^-1` is evaluated as `S^-1 U^T W`, which it
equals, so that nothing is inverted; PEFT's doubling of the damping, until its float32 inverse is accurate, then has no purpose. As in PEFT
each batch is divided by the absolute value of its largest entry, sign counted, and batches weigh alike (`scaled=True`); `False` takes the
plain second moment, in which tokens weigh alike. As there, the larger a batch, the larger `B_0` and the smaller `A_0`, and with them the
learning rate that fits; PEFT's batches are of one row. PEFT counts padding; here masked positions are left out. The SVD is exact or within
a computed bound, in the norm of `W C`: directions that the data barely tells apart may be turned among themselves.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lora_lite.core import Constants, Frozen, Statistics, Way, another_start, exact, leading_svd, require_rank, require_stats
from lora_lite.variants.pissa import PiSSAConfig, pissa

DAMPING = 0.01  # of the mean diagonal of C

corda = another_start(pissa, "corda", constants=("A0", "B0"))


@dataclass(frozen=True, eq=False)
class ScaledStatistics(Statistics):
    """Statistics of inputs divided, batch by batch, by the absolute value of their signed maximum. They are means over batches."""

    batches: int = 0

    def add(self, x: Tensor) -> Self:
        peak = x.max().abs()
        new = super().add(x / torch.where(peak > 0, peak, torch.ones_like(peak)))
        return replace(new, batches=self.batches + 1)

    def merge(self, other: Self) -> Self:
        return replace(super().merge(other), batches=self.batches + other.batches)

    @property
    def second_moment(self) -> Tensor:
        """The mean over batches of `sum z z^T`, `(i, i)`."""
        return super().second_moment * (self.count / self.batches)


def require_input(cfg: object, moment: Tensor) -> None:
    """Refuse inputs that are zero throughout, such as those behind a dead ReLU: both factors would be zero, and stay so.

    Args:
        cfg: the config, which the error names.
        moment: a statistic that is zero for such inputs.

    Raises:
        ValueError: for them.
    """
    if not bool(moment.any()):
        raise ValueError(
            f"{type(cfg).__name__}: expected inputs that are not all zero, found zeros. Leave the layer out, or use other batches."
        )


def oriented_factors(W: Frozen, oriented: Tensor, keep: slice, scale: float, svd: Way) -> Constants:
    """Compute `A0 (r, i)`, `B0 (o, r)` with `scale B0 A0 = U U^T W`, where `U S V^T` is `keep` of the SVD of `oriented = W M`, in float64.

    `U U^T W` is `U S V^T M^-1`; each factor has half of `S`.
    """
    weight = W.dense()
    U, S, _ = leading_svd(oriented, keep.stop or min(oriented.shape), svd)  # the smallest are not among the leading ones
    floor = S[0] * torch.finfo(S.dtype).eps * max(oriented.shape)
    U, S = U[:, keep], S[keep]
    inverse = torch.where(floor < S, (scale * S).rsqrt(), 0)  # a weight without full rank has no component along the others
    A0 = inverse[:, None] * (U.t() @ exact(weight))
    return {"A0": A0.to(weight.dtype).contiguous(), "B0": (U * (S / scale).sqrt()).to(weight.dtype).contiguous()}


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(PiSSAConfig):
    """Config of CorDA.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale `alpha / r`, dimensionless, > 0; the start does not depend on it.
        method: `"ipm"` adapts the directions that matter most for the data, `"kpm"` those that matter least.
        scaled: divide each batch of inputs by its largest entry before the covariance is summed, as PEFT does.
    """

    name = "corda"
    calibrated = True

    method: Literal["ipm", "kpm"] = "ipm"
    scaled: bool = True

    @property
    def statistic(self) -> type[Statistics]:
        """The class of the statistics that are gathered of the layer's inputs."""
        return ScaledStatistics if self.scaled else Statistics

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        C = exact(require_stats(self, W, stats, "second_moment"))
        require_input(self, C)
        C = C + DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        keep = slice(self.r) if self.method == "ipm" else slice(-self.r, None)
        return oriented_factors(W, exact(W.dense()) @ C, keep, self.scale, self.svd)
