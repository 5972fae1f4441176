r"""LoftQ: LoRA on a quantised weight that starts from the quantisation error.

$$y = W_q x + b + s\, B A x, \qquad s\, B_0 A_0 = \text{the best rank-} r \text{ approximation of } W - W_q, \quad s = \alpha / r$$

`W` is the weight before it was quantised, `W_q` the dequantised one. Dropout and the rank-stabilised scale are LoRA's.

Identity at init: none. It starts nearer to the model before quantisation, not at the quantised one.

Paper: Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models*, 2023,
arXiv:2310.08659.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | `A0 = sqrt(S_r / s) V_r^T` of `W - W_q` |
| `B` | `(o, r)` | yes | `B0 = U_r sqrt(S_r / s)` |
| `A0` | `(r, i)` | no | kept so that a loaded adapter can start again |
| `B0` | `(o, r)` | no | the same |

Trained per target: `r (i + o)`. Needs the dense weight once, and the original one: `build(model, cfg, original=...)`. Neither is saved.

Departures: the paper alternates between quantising and the SVD; here the base is quantised already and stays as it is, so one SVD is all
there is to do, as in PEFT's `replace_lora_weights_loftq`. The singular values are divided by `s`, so that the start does not depend on
`alpha`. Where quantising lost nothing `A` and `B` would start at zero and learn nothing; that is refused.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lora_lite.core import Constants, Frozen, Positive, SVDConfig, another_start, balanced_factors, require_rank
from lora_lite.variants.lora import LoRAParams, LowRankConfig, lora

loftq = another_start(lora, "loftq")


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(SVDConfig, LowRankConfig):
    """Config of LoftQ: the fields of LoRA, with the same meanings.

    Args:
        r: rank of the update, from 1 to the smaller width of the layer.
        alpha: numerator of the scale, dimensionless, > 0; the start does not depend on it.
    """

    name = "loftq"
    uses = frozenset({"output", "project", "dense"})
    original = True
    identity = None

    alpha: Positive = 16.0

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        require_rank(self, W)
        if stats is None:
            raise ValueError(
                "LoftQConfig: expected the weight from before quantisation, found none. Use build(model, cfg, original=state_dict_of_it)."
            )
        weight = W.dense()
        exact = torch.promote_types(weight.dtype, torch.float32)
        lost = stats.to(weight.device, exact) - weight.to(exact)
        if not lost.any():
            raise ValueError(
                "LoftQConfig: expected an original weight that quantising has changed, found the layer's own. Pass the unquantised model's "
                "weights, or use LoRAConfig on a base that is not quantised."
            )
        A0, B0 = balanced_factors(lost, self.r, self.scale, self.svd)
        return {"A0": A0, "B0": B0}

    def init(self, W: Frozen, generator: torch.Generator) -> LoRAParams:
        return {"A": W.constants["A0"].clone(), "B": W.constants["B0"].clone()}
