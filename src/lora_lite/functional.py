"""The pure functions of all variants, `(params, W, x, *, statics) -> y`.

`params` is a mapping of tensors, `W` a plain `(o, i)` weight or a `Frozen`, `x` has any leading axes. With a plain weight a
function derives the constants that it needs from the weight itself, so that one line evaluates one formula.
"""

from lora_lite.variants.dora import dora as dora
from lora_lite.variants.ia3 import ia3 as ia3
from lora_lite.variants.ia3_ff import ia3_ff as ia3_ff
from lora_lite.variants.lora import lora as lora
from lora_lite.variants.pissa import pissa as pissa

__all__ = ["dora", "ia3", "ia3_ff", "lora", "pissa"]
