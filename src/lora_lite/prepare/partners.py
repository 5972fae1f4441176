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
        TypeError: where a config returns no path.
        ValueError: where a partner is no linear layer of the model; it lists each.
    """
    wanted: dict[str, tuple[str, str]] = {}
    for target, cfg in entries:
        path: object = cfg.partner(target.path)
        if not (path is None or isinstance(path, str)):
            raise TypeError(
                f'{type(cfg).__name__}.partner at "{target.path}": expected the path of a layer or None, found {path!r}. Return e.g. '
                f'"{target.path}".'
            )
        if path is not None:
            wanted[target.path] = type(cfg).__name__, path
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
