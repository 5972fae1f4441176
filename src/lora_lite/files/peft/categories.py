"""Tensors that a file of PEFT's holds once for all layers of one sort: each layer's own here, and back."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lora_lite.core.tree import join

ROOT = "base_model."
"""Before a key without a layer."""


def spread(tensors: Mapping[str, Tensor], keys: Sequence[str], sort: Callable[[str], str], prefix: str) -> dict[str, Tensor]:
    """Return a file's tensors with those of a sort, `<key>.<sort>`, at each of its layers. A sort without a layer keeps its own."""
    paths = {name.removeprefix(prefix).rpartition(".")[0] for name in tensors if name.startswith(prefix)}
    places = {join(prefix + path, key): f"{ROOT}{key}.{sort(path)}" for path in paths for key in keys}
    found = {place: tensors[name] for place, name in places.items() if name in tensors}
    return {**{name: t for name, t in tensors.items() if name not in places.values()}, **found}


def gathered(tensors: Mapping[str, Tensor], keys: Sequence[str], sort: Callable[[str], str], prefix: str) -> dict[str, Tensor]:
    """Return tensors as a file holds them: those of `keys` once for each sort of layers."""
    found = {}
    for name, tensor in tensors.items():
        path, _, key = name.removeprefix(prefix).rpartition(".")
        found[f"{ROOT}{key}.{sort(path)}" if key in keys else name] = tensor
    return found
