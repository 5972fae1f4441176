"""Tensors that PEFT's files hold by number, `<key>.0`, `<key>.1`, which are one tensor here: a `#` in a leaf's key."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def joined(tensors: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a file's tensors with the numbered ones of each leaf as one, where their numbers and shapes allow it.

    Of joined ones the shapes stand beside them, at `<key>.shapes`, where a leaf asks for them.
    """
    together = dict(tensors)
    for key, leaf in leaves.items():
        before, _, after = key.partition("#")
        pattern = re.compile(rf"(.*{re.escape(before)})(\d+)({re.escape(after)})")
        found: dict[str, dict[int, str]] = {}
        for name in tensors if "#" in key else ():
            if match := pattern.fullmatch(name):
                found.setdefault(f"{match[1]}#{match[3]}", {})[int(match[2])] = name
        for name, numbers in found.items():
            members = [tensors[numbers[n]] for n in sorted(numbers)]
            whole = _as_one(members, leaf) if sorted(numbers) == list(range(len(numbers))) else None
            if whole is not None:
                for of_number in numbers.values():
                    del together[of_number]
                together[name] = whole
                if f"{key}.shapes" in leaves:
                    together[f"{name}.shapes"] = torch.tensor([tuple(t.shape) for t in members])
    return together


def _as_one(members: list[Tensor], leaf: Any) -> Tensor | None:
    if leaf.joined and leaf.ndim == 1:
        return torch.cat([t.flatten() for t in members])
    if len({(t.shape[1:] if leaf.joined else t.shape, t.dtype) for t in members}) > 1:
        return None
    return torch.cat(members) if leaf.joined else torch.stack(members)


def unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a file holds them, those of a key with a `#` by number."""
    apart: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        apart |= {key.replace("#", str(n)): t for n, t in enumerate(tensor)} if "#" in key else {key: tensor}
    return apart
