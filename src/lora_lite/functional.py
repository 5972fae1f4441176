"""The pure functions of all variants, `(params, W, x, *, statics) -> y`.

`params` is a mapping of tensors, `W` a plain `(o, i)` weight or a `Frozen`, `x` has any leading axes. With a plain weight a
function derives the constants that it needs from the weight itself, so that one line evaluates one formula; those
that depend on data it asks for.
"""

from lora_lite.variants.adalora import adalora as adalora
from lora_lite.variants.antipasto import antipasto as antipasto
from lora_lite.variants.asvd import asvd as asvd
from lora_lite.variants.bitfit import bitfit as bitfit
from lora_lite.variants.corda import corda as corda
from lora_lite.variants.delora import delora as delora
from lora_lite.variants.dora import dora as dora
from lora_lite.variants.eva import eva as eva
from lora_lite.variants.full import full as full
from lora_lite.variants.hra import hra as hra
from lora_lite.variants.ia3 import ia3 as ia3
from lora_lite.variants.ia3_ff import ia3_ff as ia3_ff
from lora_lite.variants.ln_tuning import ln_tuning as ln_tuning
from lora_lite.variants.loftq import loftq as loftq
from lora_lite.variants.lora import lora as lora
from lora_lite.variants.lora_ga import lora_ga as lora_ga
from lora_lite.variants.lora_xs import lora_xs as lora_xs
from lora_lite.variants.loreft import loreft as loreft
from lora_lite.variants.oft import oft as oft
from lora_lite.variants.pissa import pissa as pissa
from lora_lite.variants.road import road as road
from lora_lite.variants.ssvd import ssvd as ssvd
from lora_lite.variants.vera import vera as vera

__all__ = [
    "adalora",
    "antipasto",
    "asvd",
    "bitfit",
    "corda",
    "delora",
    "dora",
    "eva",
    "full",
    "hra",
    "ia3",
    "ia3_ff",
    "ln_tuning",
    "loftq",
    "lora",
    "lora_ga",
    "lora_xs",
    "loreft",
    "oft",
    "pissa",
    "road",
    "ssvd",
    "vera",
]
