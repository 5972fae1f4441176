r"""LN-tuning: the weights of the norms, trained as displacements.

$$y = \mathrm{norm}(x;\, w + dw,\, b + db)$$

for whatever norm the model has: LayerNorm, or an RMSNorm of any family, with its own epsilon and its own use of the weight.

Identity at init: exact, since `dw = db = 0`.

Paper: Zhao, Tu, Wei, Mei, Xie, *Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning*, 2023,
arXiv:2312.11420, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `weight` | `(d,)` | yes | zeros |
| `bias`, where the norm has one | `(d,)` | yes | zeros |

Trained per target: `d`, or `2 d` with a bias. With no names given every norm with a weight is taken.

Departures: PEFT trains copies of the norms and keeps their full values; here the displacements are trained, so that weight decay pulls
towards the model as it was. The paper tunes the norms of the attention blocks alone: name those by `target_names`.
"""

from dataclasses import dataclass

from lora_lite.core import another_start
from lora_lite.variants.full import FullConfig, full

ln_tuning = another_start(full, "ln_tuning")


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(FullConfig):
    """Config of LN-tuning, which has no hyperparameters of its own.

    Args:
        target_names: regular expressions, searched in the paths of norms; empty for all.
    """

    name = "ln_tuning"
    adapts = "norm"
