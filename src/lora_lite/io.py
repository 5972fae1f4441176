"""Params and config to one safetensors file and back. Nothing is unpickled, nothing half-written, nothing half-loaded."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from lora_lite._errors import listed, nearest, several, tree_faults
from lora_lite._tree import Tree, flatten, join
from lora_lite.adapt import Adapt
from lora_lite.build import check_entries
from lora_lite.clone import clone_module
from lora_lite.config import AdapterConfig, from_json, to_json
from lora_lite.frozen import kind_of
from lora_lite.plan import Entries, Plan
from lora_lite.targets import Target, sharing
from lora_lite.variants import VARIANTS

FORMAT = 1
_CONSTANT = "constant/"  # no module path can start so: a slash would come from the file system only


def save(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], path: str | os.PathLike[str]) -> None:
    """Write params, constants and configs to one safetensors file.

    Params are named `<target path>.<name>`. The file is written beside its place and renamed, so that whatever happens a file already
    there stays whole.

    Args:
        adapt: what the params belong to.
        params: a tree that fits it.
        path: the file to write; its directory must exist.

    Raises:
        ValueError: where `params` does not fit `adapt`.
        FileNotFoundError: where the directory does not exist.
    """
    adapt._require(params, "save")
    place = Path(path)
    if not place.parent.is_dir():
        raise FileNotFoundError(f'save: expected the directory of "{place}" to exist, found none. Create it first.')
    tensors = {name: _plain(leaf) for name, leaf in flatten(params).items()}
    tensors |= {_CONSTANT + name: _plain(leaf) for name, leaf in flatten(adapt.constants).items()}
    configs = list({id(cfg): cfg for cfg in adapt.configs}.values())
    index = {id(cfg): k for k, cfg in enumerate(configs)}
    targets = {
        target.path: {
            **{"config": index[id(cfg)], "i": target.i, "o": target.o, "role": target.role},
            **{"params": adapt.shapes[target.path], "constants": list(adapt.constants[target.path])},
        }
        for target, cfg in zip(adapt.targets, adapt.configs)
    }
    metadata = {
        "format": "pt",
        "lora_lite_format": str(FORMAT),
        "configs": json.dumps([to_json(cfg) for cfg in configs]),
        "targets": json.dumps(targets),
    }
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        safetensors.torch.save_file(tensors, beside, metadata)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    variants: Sequence[type[AdapterConfig]] | Mapping[str, type[AdapterConfig]] = (),
    remat: str | None = None,
) -> tuple[Adapt, Tree]:
    """Read a file that `save` wrote and bind it to a model. Needs neither calibration data nor an SVD.

    Args:
        model: the model that the adapter was trained on, or one of the same shapes.
        path: the file.
        variants: configs of variants from outside the package, as classes or by name.
        remat: as in `build`.

    Returns:
        `(adapt, params)`; params on the devices of their layers, in the dtypes of the file.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where the file is damaged, foreign, of another format version or variant, or of another model; it lists each fault.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: expected model as a torch.nn.Module, found {type(model).__name__}. Call load(model, path).")
    metadata, tensors = _read(Path(path))
    configs = _configs(metadata, variants, path)
    entries, faults = _entries(model, metadata["targets"], configs)
    faults += _tensor_faults(metadata["targets"], tensors)
    if not faults:
        check_entries(model, entries)
        base = clone_module(model)
        constants = _tree(metadata["targets"], tensors, _CONSTANT, "constants", base)
        params = _tree(metadata["targets"], tensors, "", "params", base)
        shapes = {where: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for where, leaves in params.items()}
        adapt = Adapt(Plan(base, entries, shapes, constants, remat))
        # With its constants at hand each variant says what its params must be: no SVD, no data.
        expected = {where: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for where, leaves in adapt.init().items()}
        faults = tree_faults(params, expected)
    if faults:
        raise ValueError(
            f'load: expected "{path}" to fit this {type(model).__name__}, found:\n{several(faults)}\n'
            "Load it onto the model that it was made for."
        )
    return adapt, params


def _plain(leaf: Tensor) -> Tensor:
    return leaf.detach().cpu().contiguous().clone()  # safetensors refuses views and shared storage


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f'load: expected a file at "{path}", found none. Pass the path that was given to save.')
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except Exception as e:
        raise ValueError(
            f'load: expected "{path}" to be a whole safetensors file, found {_what_is(path)} ({e}). Save it again with ll.save; pickled '
            "files are never opened."
        ) from e
    version = metadata.get("lora_lite_format")
    if version != str(FORMAT):
        what = "a safetensors file that ll.save did not write" if version is None else f"format version {version}"
        raise ValueError(f'load: expected "{path}" to hold lora_lite format {FORMAT}, found {what}. Load a file written by ll.save.')
    try:
        return {key: json.loads(metadata[key]) for key in ("configs", "targets")}, tensors
    except (KeyError, json.JSONDecodeError) as e:
        raise ValueError(f'load: expected "{path}" to name its configs and targets, found a damaged header ({e!r}). Save it again.') from e


def _what_is(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a pickled file"
    return "an empty file" if not head else "a truncated or foreign one"


def _configs(metadata: dict[str, Any], variants: Any, path: object) -> list[AdapterConfig]:
    more = variants if isinstance(variants, Mapping) else {cls.name: cls for cls in variants}
    known = {**VARIANTS, **more}
    missing = [c.get("variant") for c in metadata["configs"] if c.get("variant") not in known]
    if missing:
        raise ValueError(
            f'load: expected "{path}" to hold one of the variants {listed(known, 40)}, found {listed(missing)}. Closest: '
            f"{nearest(str(missing[0]), known, 1)}. Pass a variant from outside the package as load(..., variants=[ItsConfig])."
        )
    return [from_json(known[c["variant"]], c) for c in metadata["configs"]]


def _entries(model: nn.Module, targets: dict[str, Any], configs: list[AdapterConfig]) -> tuple[Entries, list[str]]:
    layers, shared = dict(model.named_modules()), sharing(model)
    entries, faults = [], []
    for path, facts in targets.items():
        kind = kind_of(layers[path]) if path in layers else None
        if kind is None:
            found = type(layers[path]).__name__ if path in layers else f"nothing; closest: {nearest(path, layers)}"
            faults.append(f'"{path}": expected a linear layer, found {found}')
            continue
        W = kind(layers[path])
        if (W.in_features, W.out_features) != (facts["i"], facts["o"]):
            faults.append(f'"{path}": expected a layer of shape {(facts["o"], facts["i"])}, found {(W.out_features, W.in_features)}')
        target = Target(path, kind, W.in_features, W.out_features, facts["role"], shared.get(path, ()))
        entries.append((target, configs[facts["config"]]))
    return tuple(entries), faults


def _tensor_faults(targets: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Hold the file's tensors against what its header promises."""
    promised = {join(path, name) for path, facts in targets.items() for name in facts["params"]}
    promised |= {_CONSTANT + join(path, name) for path, facts in targets.items() for name in facts["constants"]}
    faults = [f'missing "{name}"' for name in sorted(promised - set(tensors))]
    faults += [f'unexpected "{name}"' for name in sorted(set(tensors) - promised)]
    return faults


def _tree(targets: dict[str, Any], tensors: dict[str, Tensor], prefix: str, which: str, base: nn.Module) -> Tree:
    tree: Tree = {}
    for path, facts in targets.items():
        device = next(base.get_submodule(path).parameters()).device  # copied: a mapped file is unaligned, and sums would round otherwise
        tree[path] = {name: tensors[prefix + join(path, name)].to(device, copy=True) for name in facts[which]}
    return tree
