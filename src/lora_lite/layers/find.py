"""What can be adapted beside linear layers, where a name asks for it: embeddings, convolutions, experts' weights, bare parameters."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lora_lite.core.frozen import FrozenLinear
from lora_lite.core.tree import join
from lora_lite.layers.convolution import CLASSES, conv_kind
from lora_lite.layers.embedding import FrozenEmbedding
from lora_lite.layers.experts import FrozenExperts, has_experts, routed_class
from lora_lite.layers.kinds import kind_of
from lora_lite.layers.module import is_norm, kind_at
from lora_lite.layers.parameter import FrozenHeld, reader_class

_LAYERS = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, *CLASSES)
"""Classes whose parameters are no targets of their own: their layers are, or keep other references to them."""


def named_kinds(model: nn.Module) -> dict[str, type[FrozenLinear]]:
    """Find what can be adapted only by name: the kind of each layer and parameter, by path, in the model's order."""
    found: dict[str, type[FrozenLinear]] = {}
    for path, module in model.named_modules():
        kind = _layer_kind(module)
        if kind is not None:
            found[path] = kind
        for name in _parameters(module):
            found[join(path, name)] = _parameter_kind(module, name)
    return found


def _layer_kind(module: nn.Module) -> type[FrozenLinear] | None:
    return FrozenEmbedding if isinstance(module, nn.Embedding) else conv_kind(module)


def _parameters(module: nn.Module) -> Iterator[str]:
    """Name the parameters that are weights of their own."""
    if isinstance(module, _LAYERS) or kind_of(module) is not None or is_norm(module):
        return
    for name, p in module._parameters.items():
        if p is not None and p.dim() in (2, 3) and p.is_floating_point() and not name.endswith("bias"):
            yield name


def _parameter_kind(module: nn.Module, name: str) -> type[FrozenLinear]:
    return FrozenExperts if has_experts(module) and name in ("gate_up_proj", "up_proj", "down_proj") else FrozenHeld


def linear_kind(model: nn.Module, path: str, kind: type[FrozenLinear]) -> type[FrozenLinear]:
    """Give the kind of a linear layer at its place: that of a held weight inside attention that reads it without calling the layer."""
    around = model.get_submodule(path.rpartition(".")[0]) if path else None
    return FrozenHeld if isinstance(around, nn.MultiheadAttention) else kind


def kind_here(model: nn.Module, path: str, adapts: str, kinds: Sequence[type[FrozenLinear]] = ()) -> type[FrozenLinear] | None:
    """Find the kind of what stands at a path, for a variant of this sort; None where there is nothing that it adapts."""
    parent, _, name = path.rpartition(".")
    try:
        around = model.get_submodule(parent)
        layer = None if name in around._parameters else model.get_submodule(path)
    except AttributeError:
        return None
    if layer is None:
        return _parameter_kind(around, name) if adapts == "linear" and name in _parameters(around) else None
    kind = kind_at(layer, adapts, kinds)
    if adapts != "linear":
        return kind
    return _layer_kind(layer) if kind is None else linear_kind(model, path, kind)


def reader_of(kind: type[FrozenLinear]) -> Callable[[Any], Any] | None:
    """Give what makes the class of the module around a target of this kind, None where that stays as it is."""
    if issubclass(kind, FrozenExperts):
        return routed_class
    return reader_class if issubclass(kind, FrozenHeld) else None


def names(pattern: str, path: str, linear: Mapping[str, object]) -> bool:
    """Tell whether a pattern names what stands at `path`: by the last part of the path, or because it can mean nothing else.

    `.*` or `layers\\.0` match a whole region, in which the linear layers are meant.
    """
    if not re.search(pattern, path):
        return False
    region = path[: len(path) - len(path.rpartition(".")[2])] + "\0"
    return not re.search(pattern, region) or not any(re.search(pattern, other) for other in linear)
