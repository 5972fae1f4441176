"""`from_kohya` and `from_diffusers`: one file of an image tool as an `adapt` and its params."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import require_type, several, tree_faults
from lora_lite.core.tree import Tree
from lora_lite.files.kohya.methods import ALPHA, METHODS, UP
from lora_lite.files.kohya.names import Names, prefix_of, split
from lora_lite.files.peft.adapter_name import unwrapped
from lora_lite.files.peft.demands import check_fields
from lora_lite.files.peft.fields import carried, resolve
from lora_lite.files.peft.hub import CONFIG, around
from lora_lite.files.peft.layers import kernel_size, of_kernel
from lora_lite.files.peft.names import Table
from lora_lite.files.peft.rows import rows_of
from lora_lite.files.stored import read_of_image_tool
from lora_lite.layers.find import Found, find
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import as_kinds
from lora_lite.layers.transposed import CLASSES as TRANSPOSED
from lora_lite.prepare.worn import refuse_unadaptable

FILE = "pytorch_lora_weights.safetensors"
_PLAIN = ("lora", "mica")
"""The variants of PEFT's LoRA that are two factors beside the weight as it is."""


@made_alike
def from_kohya(
    model: nn.Module, path: str | os.PathLike[str], *, prefix: str | None = None, remat: str | None = None, kinds: Sequence[type[Kind]] = ()
) -> tuple[Adapt, Tree]:
    """Read LoRA, LoHa or LoKr from a file of kohya's or LyCORIS' and bind it to a model.

    Names there have underscores in the place of dots. They are resolved by the names of the model's own layers, or those that transformers
    gave them in older versions. The scale is `alpha / r`, of each layer by itself.

    Args:
        model: one part of a pipeline, such as its U-Net or a text encoder.
        path: the safetensors file.
        prefix: the part's name in the file, such as `"lora_unet"` or `"lora_te1"`; None where the file has one part.
        remat: as in `build`.
        kinds: as in `build`.

    Returns:
        `(adapt, params)`; params on the devices of their layers, in at least float32.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where the file is damaged, has several parts or another prefix, or names that the model has not, or more than once. It
            lists each name.
        TypeError: where an argument is of another type.
    """
    return _read("from_kohya", model, path, prefix, remat, kinds)


@made_alike
def from_diffusers(
    model: nn.Module, path: str | os.PathLike[str], *, prefix: str | None = None, remat: str | None = None, kinds: Sequence[type[Kind]] = ()
) -> tuple[Adapt, Tree]:
    """Read LoRA from a file of diffusers' and bind it to a model.

    Keys as `save_lora_weights` writes them are read, and the older ones. The scale is 1 unless the file has an `alpha`, among its
    tensors or in its metadata.

    Args:
        model: one part of a pipeline, such as its U-Net or a text encoder.
        path: the safetensors file, or the folder of a `pytorch_lora_weights.safetensors`.
        prefix: the part's name in the file, such as `"unet"` or `"text_encoder"`; None where the file has one part.
        remat: as in `build`.
        kinds: as in `build`.

    Returns:
        As `from_kohya`.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: as `from_kohya`.
        TypeError: where an argument is of another type.
    """
    return _read("from_diffusers", model, path, prefix, remat, kinds)


def _read(call: str, model: Any, path: Any, prefix: Any, remat: str | None, kinds: Any) -> tuple[Adapt, Tree]:
    usage = f"{call}(model, path)"
    require_type(isinstance(model, nn.Module), usage, "model", "a torch.nn.Module", model)
    require_type(isinstance(path, str | os.PathLike), usage, "path", "the path of a file", path)
    require_type(prefix is None or isinstance(prefix, str), usage, "prefix", 'a string, e.g. "lora_unet"', prefix)
    kinds = as_kinds(kinds)
    refuse_unadaptable(model)
    place = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if place.is_file() and (folder := around(place)) is not None:
        raise ValueError(
            f'{call}: expected a file of an image tool at "{place}", found one of PEFT\'s, whose scale is in {CONFIG} beside it. '
            f'Read the folder: ll.from_peft(model, "{folder}").'
        )
    metadata, tensors = read_of_image_tool(call, place)
    named, foreign, repeated = _by_name(tensors)
    foreign = [key for key in foreign if prefix is None or prefix_of(key) in ("", prefix)]
    prefix = _prefix(call, place, named, prefix)
    found = find(model, "linear", kinds)
    layers, written, more = _by_path(named, prefix, Names(found, Table.of(model).renamed))
    alphas = _alphas(call, place, metadata, prefix)
    if alphas is not None:
        alphas = functools.reduce(lambda fields, place: carried(fields, place[1], place[0]), written.items(), alphas)
    entries: dict[str, tuple[AdapterConfig, dict[str, Tensor]]] = {}
    way = "of another method than LoRA, LoHa and LoKr here. Merge the file by the tool that made it"
    faults = [f'unexpected "{key}", {way}' for key in foreign] + repeated + more
    for at, own in layers.items():
        try:
            _require_kernel(model, at, own)
            entries[at] = _entry(at, own, _shape(model, found, at), alphas)
        except ValueError as e:
            faults.append(f'"{at}": {e}')
    _require(call, place, model, faults or ([] if entries else ["no tensors of LoRA, LoHa or LoKr"]))
    adapt = build(model, _grouped([cfg for cfg, _ in entries.values()]), remat=remat, kinds=kinds)
    _require(call, place, model, tree_faults({p: leaves for p, (_, leaves) in entries.items()}, adapt.shapes))
    devices = {target.path: target.kind.at(model, target.path).device for target in adapt.targets}
    params = {
        t.path: {name: p.to(devices[t.path], cfg.dtype, copy=True).contiguous() for name, p in entries[t.path][1].items()}
        for t, cfg in zip(adapt.targets, adapt.configs)
    }
    return adapt, adapt._plan.ordered(params)


def _require(call: str, place: Path, model: nn.Module, faults: list[str]) -> None:
    if faults:
        raise ValueError(
            f'{call}: expected "{place}" to fit this {type(model).__name__}, found:\n{several(faults)}\n'
            "Pass the part of the pipeline that the file was made for. Files in the names of another code base are converted by its tools."
        )


def _by_name(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str], list[str]]:
    """Sort tensors by the name of their module. List the keys of other kinds, and those that say a tensor again."""
    named: dict[str, dict[str, Tensor]] = {}
    foreign, repeated = [], []
    for key, tensor in tensors.items():
        cut = split(unwrapped(key))
        if cut is None:
            foreign.append(key)
        elif cut[1] in named.setdefault(cut[0], {}):
            repeated.append(f'"{key}": a second tensor of the same meaning')
        else:
            named[cut[0]][cut[1]] = tensor
    return named, foreign, repeated


def _prefix(call: str, place: Path, named: Mapping[str, Any], prefix: str | None) -> str:
    """Return the prefix of the part that is meant.

    Raises:
        ValueError: where the file has several parts and none is named, or lacks the one that is.
    """
    there = list(dict.fromkeys(map(prefix_of, named)))
    if prefix is None and len(there) > 1:
        raise ValueError(
            f'{call}: expected "{place}" to have one part of a pipeline, found {", ".join(map(repr, there))}. Name this model\'s: '
            f"prefix={there[0]!r}."
        )
    if prefix is not None and not any(_without(name, prefix) is not None for name in named):
        raise ValueError(f'{call}: expected "{place}" to have the part {prefix!r}, found {", ".join(map(repr, there))}. Name one of these.')
    return prefix if prefix is not None else (there or [""])[0]


def _without(name: str, prefix: str) -> str | None:
    if not prefix:
        return name
    return next((name[len(prefix) + 1 :] for mark in "_." if name.startswith(prefix + mark)), None)


class Placed(NamedTuple):
    """The tensors of a part by the path of their layer, its name in the file where that is another, and what has no place."""

    layers: dict[str, dict[str, Tensor]]
    written: dict[str, str]
    faults: list[str]


def _by_path(named: Mapping[str, dict[str, Tensor]], prefix: str, names: Names) -> Placed:
    layers, written, faults = dict[str, dict[str, Tensor]](), dict[str, str](), list[str]()
    for name, own in named.items():
        rest = _without(name, prefix)
        if rest is None or (prefix and prefix_of(name) not in ("", prefix)):
            continue  # of another part
        try:
            path = name if name in names.paths else names.path(rest)  # a model may start with such a word itself
        except ValueError as e:
            faults.append(f'"{name}": {e}')
            continue
        if path in layers:
            faults.append(f'"{name}": a second name of "{path}"')
        layers[path] = own
        written |= {path: rest} if path not in (name, rest) else {}
    return Placed(layers, written, faults)


def _alphas(call: str, place: Path, metadata: Mapping[str, str], prefix: str) -> dict[str, Any] | None:
    """Return the fields of PEFT's config that diffusers puts into the metadata for a part, or None.

    Raises:
        ValueError: where they ask for what these files do not hold.
    """
    try:
        fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        own = {
            key[len(prefix) + 1 :] if prefix else key: value for key, value in fields.items() if not prefix or key.startswith(f"{prefix}.")
        }
    except (ValueError, AttributeError) as e:
        raise ValueError(
            f'{call}: expected lora_adapter_metadata in "{place}" to be a JSON object, found a damaged one ({e}). Save the file again.'
        ) from e
    if "lora_alpha" not in own:
        return None
    own = {"peft_type": "LORA", **own}
    try:
        check_fields(own, f"{place}: lora_adapter_metadata")
    except ValueError as e:
        raise ValueError(f"{call}: {str(e).removeprefix('from_peft: ')}") from e
    asked = "lora_bias" if own.get("lora_bias") else next(row.config.name for row in rows_of(own["peft_type"]) if row.when(own, {}))
    if asked not in _PLAIN:
        raise ValueError(
            f'{call}: expected lora_adapter_metadata in "{place}" to ask for a plain LoRA, found {asked}. Read the adapter from PEFT\'s '
            "files, with from_peft, or merge it where it was trained."
        )
    return own


def _require_kernel(model: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor of a kernel that is not the layer's: laid out flat, kernels of one size look alike."""
    layer = model.get_submodule(path)
    if isinstance(layer, TRANSPOSED):
        raise ValueError("a transposed convolution, of which these files have none. Keep the adapter with ll.save")
    kernel = kernel_size(layer)
    for key, tensor in tensors.items():
        if not of_kernel(tensor, kernel):
            raise ValueError(f"{key} of shape {tuple(tensor.shape)}, expected a kernel of {kernel}")


def _entry(
    path: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], fields: Mapping[str, Any] | None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    own = {key: t for key, t in tensors.items() if key != ALPHA}
    method = next((method for method in METHODS.values() if set(own) and set(own) <= set(method.keys)), None)
    if method is None:
        raise ValueError(f"tensors {', '.join(tensors)}, of no method alone")
    if ALPHA in tensors and tensors[ALPHA].numel() != 1:
        raise ValueError(f"alpha of shape {tuple(tensors[ALPHA].shape)}, expected one number")
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else None
    if alpha is None and fields is not None and UP in own:
        alpha = float(resolve(fields, "lora_alpha", path)) * (own[UP].shape[1] ** 0.5 if resolve(fields, "use_rslora", path) else 1.0)
    if alpha is not None and alpha < 0:
        own, alpha = _negated(own), -alpha
    found = method.read(own, alpha, shape)
    dtype = torch.float64 if torch.float64 in [t.dtype for t in own.values()] else torch.float32
    cfg = method.config(**found.values, dtype=dtype, target_names=(f"^{re.escape(path)}$",), exclude_names=())
    return cfg, found.params


def _negated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an update with one of its factors negated, since configs take no negative scale. Whole matrices have none."""
    factor = next((key for key in (UP, "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if key in tensors), None)
    return dict(tensors) if factor is None else {**tensors, factor: -tensors[factor]}


def _shape(model: nn.Module, found: Found, path: str) -> tuple[int, int]:
    W = found[path].at(model, path)
    return W.out_features, W.in_features


def _grouped(configs: Sequence[AdapterConfig]) -> list[AdapterConfig]:
    """Return one config for all layers that agree in everything but their names."""
    groups: dict[AdapterConfig, list[str]] = {}
    for cfg in configs:
        groups.setdefault(dataclasses.replace(cfg, target_names=()), []).extend(cfg.target_names)
    return [dataclasses.replace(cfg, target_names=tuple(names)) for cfg, names in groups.items()]
