"""IA3's gates in PEFT's files: of a layer's inputs, `(1, i)`, or of its outputs, `(o, 1)`.

A convolution's gate is `(1, channels, 1, 1)` either way, and a gate of one number `(1, 1)`. There `feedforward_modules` decides.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

GATE = "ia3_l"
FEEDFORWARD = "feedforward_modules"


def gates_inputs(fields: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT gates the inputs of a layer: an expression matches its path in full, or one of several names is its end."""
    names = fields.get(FEEDFORWARD) or []
    return bool(re.fullmatch(names, path)) if isinstance(names, str) else any(path.endswith(name) for name in names)


def laid_out(gate: Tensor, fields: Mapping[str, Any], path: str) -> Tensor:
    """Return a gate as `(1, i)` of inputs, or of outputs as `(o, 1)` or `(o,)`, so that its shape says which."""
    if gate.dim() == 2 and gate.numel() != 1:
        return gate
    return gate.reshape(1, -1) if gates_inputs(fields, path) else gate.flatten()


def is_of_inputs(gate: Tensor) -> bool:
    """Whether a gate that is laid out so is one of inputs."""
    return gate.dim() == 2 and len(gate) == 1


def carried(fields: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return the fields with the layer at `new` among those whose inputs are gated, where `old` is."""
    if not gates_inputs(fields, old) or gates_inputs(fields, new):
        return dict(fields)
    names = fields[FEEDFORWARD]
    return {**fields, FEEDFORWARD: f"(?:{names})|{re.escape(new)}" if isinstance(names, str) else [*names, new]}
