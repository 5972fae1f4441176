"""Tensors that PEFT's files hold by number, `<key>.0`, `<key>.1`, which are one stacked tensor here: a `#` in a leaf's key."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def stacked(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Return a file's tensors with the numbered ones of each key stacked, where their numbers and shapes allow it."""
    together = dict(tensors)
    for key in keys:
        before, _, after = key.partition("#")
        pattern = re.compile(rf"(.*{re.escape(before)})(\d+)({re.escape(after)})")
        found: dict[str, dict[int, str]] = {}
        for name in tensors:
            if match := pattern.fullmatch(name):
                found.setdefault(f"{match[1]}#{match[3]}", {})[int(match[2])] = name
        for name, numbers in found.items():
            members = [tensors[numbers[n]] for n in sorted(numbers)]
            if sorted(numbers) == list(range(len(numbers))) and len({(t.shape, t.dtype) for t in members}) == 1:
                for of_number in numbers.values():
                    del together[of_number]
                together[name] = torch.stack(members)
    return together


def unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a file holds them, those of a key with a `#` by number."""
    apart: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        apart |= {key.replace("#", str(n)): t for n, t in enumerate(tensor)} if "#" in key else {key: tensor}
    return apart
