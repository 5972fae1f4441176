"""The layers that an adapter was made for, as far as its own files tell: enough to read it without its base model.

The weights are zeros. Whether an answer depends on them is for the caller to know.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.errors import several
from lora_lite.core.tree import join
from lora_lite.files.adapter_file import read
from lora_lite.files.header import BASE, Header
from lora_lite.files.inferred import layer_of, placed
from lora_lite.files.kohya.methods import DOWN, MID, UP
from lora_lite.files.kohya.names import of_image_tools, split
from lora_lite.files.mapped import places_in
from lora_lite.files.peft.adapter_name import unwrapped
from lora_lite.files.peft.hub import CONFIG, WEIGHTS
from lora_lite.files.peft.parts import PREFIX
from lora_lite.layers.convolution import ConvKind
from lora_lite.layers.embedding import EmbeddingKind
from lora_lite.layers.linear import LinearKind
from lora_lite.variants import VARIANTS

_PLAIN = {kind.__name__: kind for kind in (LinearKind, ConvKind, EmbeddingKind)}


class Layer(NamedTuple):
    """A layer by its kind's name and the shape of its weight, as it is stored; or a module by its own values."""

    kind: str
    shape: tuple[int, ...]
    values: Mapping[str, Tensor] = {}


class Outline(NamedTuple):
    """The layers by path, and the reasons why they may not be what the base model has there."""

    layers: dict[str, Layer]
    unsure: dict[str, list[str]]


def outline(place: Path) -> Outline:
    """Return the layers of an adapter, a file that `save` or an image tool wrote, or a folder of PEFT's.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where a file is damaged or foreign.
    """
    if place.is_dir():
        return _of_peft(place)
    return _of_image_tools(place) if of_image_tools(place) else _of_header(*read(place))


def _of_header(header: Header, tensors: Mapping[str, Tensor]) -> Outline:
    layers, unsure = dict[str, Layer](), dict[str, list[str]]()
    for path, stored in header.targets.items():
        name = header.configs[stored.config]["name"]
        site = VARIANTS[name].adapts if name in VARIANTS else "linear"
        if path in header.values:
            values = {leaf: tensors[BASE + join(path, leaf)] for leaf in header.values[path]}
            layers[path] = Layer("norm" if site == "norm" else "module", (), values)
        elif site != "linear":
            unsure.setdefault(f"the file does not describe the {site} that {name} adapts", []).append(path)
        elif path in header.layers and header.layers[path][0] in _PLAIN:
            layers[path] = Layer(header.layers[path][0], tuple(header.layers[path][1]))
        else:
            layers[path] = Layer("LinearKind", (stored.o, stored.i))
            kind = header.layers[path][0].removesuffix("Kind") if path in header.layers else "layer"
            unsure.setdefault(f"the file does not describe the {kind}", []).append(path)
    return Outline(layers, unsure)


def tables(places: Iterable[Path]) -> set[str]:
    """Return the paths at which some of the adapters adapt an embedding."""
    return {path for place in places for path, layer in outline(place).layers.items() if layer.kind == "EmbeddingKind"}


Shapes = Mapping[str, tuple[int, ...]]

_INFERRED: dict[str, tuple[tuple[str, ...], Callable[[Shapes], tuple[str, tuple[int, ...]]]]] = {
    "kohya": ((DOWN, UP), lambda s: ("ConvKind" if len(s[DOWN]) > 2 else "LinearKind", (s[UP][0], *_kernel(s)))),
    "lora": (
        ("lora_A.weight", "lora_B.weight"),
        lambda s: (
            "ConvKind" if len(s["lora_A.weight"]) > 2 else "LinearKind",
            (s["lora_B.weight"][0], *s["lora_A.weight"][1:]),
        ),
    ),
    "embedding": (
        ("lora_embedding_A", "lora_embedding_B"),
        lambda s: ("EmbeddingKind", (s["lora_embedding_A"][1], s["lora_embedding_B"][0])),
    ),
    "loha": (("hada_w1_a", "hada_w1_b"), lambda s: ("LinearKind", (s["hada_w1_a"][0], s["hada_w1_b"][1]))),
    "lokr": ((), lambda s: ("LinearKind", tuple(a * b for a, b in zip(_whole(s, "lokr_w1"), _whole(s, "lokr_w2"))))),
}
"""By a name of ours, the keys that PEFT's files have of a layer, and the layer that the shapes of its tensors imply."""

_KEYS = r"lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?"


def _kernel(shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of a kernel of kohya's, which has its size in the factor between where there is one."""
    return (shapes[DOWN][1], *shapes.get(MID, shapes[DOWN])[2:])


def _whole(shapes: Shapes, name: str) -> tuple[int, int]:
    """Return the shape of a matrix of LoKr, which may be kept as two factors."""
    if name in shapes:
        return shapes[name][0], math.prod(shapes[name][1:])
    return shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]


def _of_peft(folder: Path) -> Outline:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f'expected an adapter in "{folder}", found no {name}. Pass a file that ll.save wrote, or a folder of PEFT\'s.'
            )
    try:
        fields: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text("utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f'expected "{folder / CONFIG}" to be a JSON object, found a damaged one ({e}). Save the adapter again.') from e
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    unsure: dict[str, list[str]] = {}
    for key, place in sorted(places_in(folder / WEIGHTS).items(), key=lambda item: _numbered(item[0])):
        found = re.fullmatch(rf"{re.escape(PREFIX)}(?:(.*)\.)?({_KEYS})", unwrapped(key))
        if found is None:
            unsure.setdefault(f"no layer follows from tensors of {fields.get('peft_type')}", []).append(key)
        else:
            shapes.setdefault(found[1] or "", {})[found[2]] = place.shape
    layers = {path: layer for path, own in shapes.items() if (layer := _implied(own)) is not None}
    for path in shapes.keys() - layers.keys():
        unsure.setdefault("no layer follows from the tensors", []).append(path)
    for path in [path for path, layer in layers.items() if layer.kind == "ConvKind" and max(layer.shape[2:]) > 1]:
        unsure.setdefault("the files do not describe the dilation and the padding of a convolution", []).append(path)
    for path in filter(_of_attention, layers):
        if not any(other != path and other.rpartition(".")[0] == path.rpartition(".")[0] for other in layers):
            unsure.setdefault("the files do not tell an nn.MultiheadAttention, where they have another meaning", []).append(path)
    for field in ("target_parameters", "fan_in_fan_out"):
        if fields.get(field):
            unsure[f"the files do not describe the layers of {field}"] = list(layers)
    return Outline(layers, unsure)


def _of_attention(path: str) -> bool:
    """Whether an `nn.MultiheadAttention` may have a layer, whose only one is `out_proj`. PEFT wraps that module."""
    return path.rpartition(".")[2] == "out_proj" or "base_layer" in path.split(".")


def _of_image_tools(path: Path) -> Outline:
    """Return the layers under the names of the file, which are not those of the model."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, place in sorted(places_in(path).items(), key=lambda item: _numbered(item[0])):
        if (cut := split(key)) is not None:
            shapes.setdefault(cut[0], {})[cut[1]] = place.shape
    layers = {name: layer for name, own in shapes.items() if (layer := _implied(own)) is not None}
    return Outline(layers, {"files of image tools have other names than the model": list(layers)})


def _numbered(key: str) -> list[tuple[int, str]]:
    """Return a key by which numbers in names sort by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _implied(shapes: Shapes) -> Layer | None:
    for needed, layer in _INFERRED.values():
        try:
            if all(key in shapes for key in needed):
                return Layer(*layer(shapes))
        except (KeyError, IndexError):
            continue
    return None


def model_of(outlines: Iterable[Outline]) -> nn.Module:
    """Return one model with the layers of several adapters, their weights zeros.

    Raises:
        ValueError: where two are of layers of other shapes.
    """
    layers: dict[str, Layer] = {}
    faults = []
    for found in outlines:
        for path, layer in found.layers.items():
            other = layers.setdefault(path, layer)
            if (other.kind, other.shape) != (layer.kind, layer.shape):
                faults.append(f'"{path}": a layer of shape {other.shape} in one, {layer.shape} in another')
    if faults:
        raise ValueError(f"expected adapters of one base model, found:\n{several(faults)}\nCombine adapters of the same model.")
    root = nn.Module()
    for path, layer in layers.items():
        placed(root, path, _built(layer))
    return root.eval()


def _built(layer: Layer) -> nn.Module:
    if layer.values:
        size = next(iter(layer.values.values())).shape
        module = nn.LayerNorm(size, bias="bias" in layer.values) if layer.kind == "norm" else nn.Module()
        for name, value in layer.values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return module
    built = layer_of(layer.shape, bias=False, embedding=layer.kind == "EmbeddingKind", device="cpu")
    for name, p in built.named_parameters():
        setattr(built, name, nn.Parameter(torch.zeros_like(p), requires_grad=False))
    return built
