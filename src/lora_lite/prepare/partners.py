"""Find the layers whose weights a variant's constants read beside those of its targets."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_lite.core.errors import nearest, several
from lora_lite.core.plan import Entries
from lora_lite.layers.find import find


def read_partners(base: nn.Module, entries: Entries, kinds: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the partner of each target whose config names one, as a frozen layer, by the target's path.

    Raises:
        ValueError: where a partner is no linear layer of the model; it lists each.
    """
    wanted = {target.path: (type(cfg).__name__, path) for target, cfg in entries if (path := cfg.partner(target.path)) is not None}
    if not wanted:
        return {}
    linear = find(base, "linear", kinds)
    faults = [
        f'"{path}": expected a linear layer at "{other}", found none. Closest: {nearest(other, linear)}'
        for path, (_, other) in wanted.items()
        if other not in linear
    ]
    if faults:
        names = ", ".join(sorted({name for name, _ in wanted.values()}))
        raise ValueError(
            f"build: expected the partner of each target of {names} in the model, found:\n{several(faults)}\n"
            "Narrow target_names to the layers that have one, or name the partner as this model does."
        )
    return {path: linear[other].at(base, other) for path, (_, other) in wanted.items()}
