"""Modules that follow from the names and shapes of tensors, for checkpoints of no known model."""

from collections.abc import Collection, Iterable

import torch
from torch import nn

from lora_lite.files.mapped import Mapped
from lora_lite.files.peft.calls import in_attention
from lora_lite.files.peft.twice import other_places

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def inferred(mapped: Mapped, tables: Collection[str] = ()) -> nn.Module:
    """Return a model on meta of the modules that a checkpoint's tensors belong to.

    A `weight` of two axes is one of an `nn.Linear`, or of an `nn.Embedding` at the paths of `tables` and where its name says so; of three
    to five of a convolution. Stride and padding are not known: the model is there to be merged into, not to be called.
    """
    root = nn.Module()
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, place in mapped.places.items():
        path, _, leaf = name.rpartition(".")
        tensors.setdefault(path, {})[leaf] = place.shape
    for path, shapes in tensors.items():
        placed(root, path, _layer(shapes, path in tables or _named_table(path)))
    return root


def placed(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, with modules above it where they are lacking. It keeps the children of a module that is there."""
    if not path:
        for name, p in layer._parameters.items():
            root.register_parameter(name, p)
        return
    above = root
    *parents, last = path.split(".")
    for part in parents:
        if part not in above._modules:
            above.add_module(part, nn.Module())
        above = above._modules[part]  # type: ignore[assignment]
    before = above._modules.get(last)
    layer._modules.update({} if before is None else before._modules)
    above._modules[last] = layer


def _named_table(path: str) -> bool:
    return "emb" in path.rpartition(".")[2].lower() or path.endswith(("wte", "wpe"))


def _layer(shapes: dict[str, tuple[int, ...]], table: bool) -> nn.Module:
    weight = shapes.get("weight", ())
    if set(shapes) <= {"weight", "bias"} and len(weight) >= 1:
        return layer_of(weight, "bias" in shapes, table)
    return with_parameters(shapes)


def with_parameters(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Return a module that has parameters of these shapes, on meta."""
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return module


def layer_of(weight: Iterable[int], bias: bool, embedding: bool = False, device: str = "meta") -> nn.Module:
    """Return the layer that keeps a weight of this shape."""
    first, *rest = weight
    if len(rest) == 1 and embedding and not bias:
        table = torch.empty(first, rest[0], device=device)
        return nn.Embedding.from_pretrained(table, freeze=False)  # skip_init draws it on meta, for which torch imports its compiler
    if len(rest) == 1:
        return nn.utils.skip_init(nn.Linear, rest[0], first, bias=bias, device=device)
    if len(rest) + 1 in _CONVS:
        return nn.utils.skip_init(_CONVS[len(rest) + 1], rest[0], first, tuple(rest[1:]), bias=bias, device=device)
    if not rest:
        return nn.utils.skip_init(nn.LayerNorm, first, bias=bias, device=device)
    return with_parameters({"weight": (first, *rest), **({"bias": (first,)} if bias else {})})


def follows(model: nn.Module, path: str) -> bool:
    """Whether a layer is what its class and the shape of its weight imply.

    A convolution may have a dilation or a padding mode besides, `nn.MultiheadAttention` reads its projection's weight without a call, and a
    layer may stand at a second place. The forms of other libraries differ there.
    """
    layer = model.get_submodule(path)
    apart = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (layer.padding_mode != "zeros" or max(layer.dilation) > 1)
    return not (apart or in_attention(model, path) or (path != "" and other_places(model, path)))
