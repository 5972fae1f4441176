"""The pure functions of all variants, `(params, W, x, *, statics) -> y`, each under its variant's name in `VARIANTS`.

`params` is a mapping of tensors, `W` a plain `(o, i)` weight or a `Frozen`, `x` has any leading axes. With a plain weight a
function derives the constants that it needs from the weight itself, so that one line evaluates one formula; those
that depend on data it asks for.
"""

import sys
from collections.abc import Callable
from typing import Any

from lora_lite.variants import VARIANTS as _VARIANTS

__all__ = sorted(_VARIANTS)

for _name, _cls in _VARIANTS.items():
    globals()[_name] = getattr(sys.modules[_cls.__module__], _name)


def __getattr__(name: str) -> Callable[..., Any]:  # for type checkers, which do not see the names above
    raise AttributeError(f'lora_lite.functional has no function "{name}". It has {", ".join(__all__)}.')
