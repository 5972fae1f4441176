"""`from_peft`: PEFT's two files as an `adapt` and its params."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.config import AdapterConfig
from lora_lite.core.device import made_on_cpu
from lora_lite.core.errors import nearest, require_type, several, tree_faults
from lora_lite.core.frozen import Constants
from lora_lite.core.tree import Tree, join
from lora_lite.files.peft import biases, numbered, shared, tokens, twice, whole
from lora_lite.files.peft.categories import spread
from lora_lite.files.peft.fields import DEFAULTS, OFF, check_fields, resolve
from lora_lite.files.peft.hub import CONFIG, WEIGHTS, folder_of
from lora_lite.files.peft.layers import as_linear, axes_of, unsaved
from lora_lite.files.peft.names import in_names_of
from lora_lite.files.peft.row import Leaf, Row, own_bias
from lora_lite.files.peft.rows import rows_of
from lora_lite.files.peft.targeted import named
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import as_kinds
from lora_lite.variants.bitfit import BitFitConfig
from lora_lite.variants.full import FullConfig
from lora_lite.variants.oft import project

PREFIX = "base_model.model."

Layers = dict[str, dict[str, Tensor]]
Chosen = dict[str, tuple[Row, Any]]


@made_on_cpu
def from_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    remat: str | None = None,
    kinds: Sequence[type[Kind]] = (),
    revision: str | None = None,
    subfolder: str = "",
) -> tuple[Adapt, Tree]:
    """Read an adapter that PEFT saved and bind it to a model. The package `peft` is not needed.

    LoRA comes with its patterns and rank-stabilised scale, on embeddings, convolutions and `target_parameters` too; the page on PEFT lists
    the methods. `modules_to_save` become targets of `FullConfig`. The layers are those that the file of tensors names. Layers with other
    hyperparameters get a config of their own.

    Args:
        model: the model that the adapter was trained on, as it was before PEFT wrapped it.
        directory: the argument of `save_pretrained`: the folder with `adapter_config.json` and `adapter_model.safetensors`. Where there is
            none, the name of a repository on the Hugging Face Hub, `"user/repo"`, which needs `huggingface_hub`.
        remat: as in `build`.
        kinds: as in `build`.
        revision: a branch, a tag or a commit of the repository; None for its main branch.
        subfolder: the folder inside `directory` that has the files.

    Returns:
        `(adapt, params)`; params on the devices of their layers, in at least float32, as PEFT keeps them.

    Raises:
        FileNotFoundError: where a file is missing, or neither a folder nor a repository is found.
        ModuleNotFoundError: where a repository is asked for and `huggingface_hub` is not installed.
        ValueError: where a file is damaged, is of another model, or asks for what is not supported; it names each field and tensor.
        TypeError: where an argument is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"from_peft: expected model as a torch.nn.Module, found {type(model).__name__}. Call from_peft(model, directory).")
    call = "from_peft(model, directory)"
    require_type(isinstance(directory, str | os.PathLike), call, "directory", "the path of a folder", directory)
    folder, kinds = folder_of(directory, revision, subfolder), as_kinds(kinds)
    fields = _read_fields(folder / CONFIG)
    check_fields(fields, folder / CONFIG)
    saved = shared.entries_joined(fields["peft_type"], _read_tensors(folder / WEIGHTS))
    keys = [*_leaves(fields["peft_type"]), *_zeros(fields["peft_type"])]
    saved = numbered.joined(saved, _leaves(fields["peft_type"]))
    for row in rows_of(fields["peft_type"]):
        saved = spread(saved, row.of_sort, row.sort, PREFIX) if row.of_sort else saved
    common, saved = shared.split(fields["peft_type"], saved)
    fields, saved, misnamed = in_names_of(model, fields, saved, PREFIX, keys, kinds)
    saved, faults = twice.at_first_place(model, saved, PREFIX)
    modules, saved = whole.split(model, fields, saved, PREFIX)
    rows, saved, misfits = tokens.split(model, fields, saved, PREFIX)
    adapted, others, saved = biases.split(model, fields, saved, PREFIX)
    shifts, more = biases.of_layers(model, others, kinds)
    modules = {**modules, FullConfig: {**modules.get(FullConfig, {}), **more}} if more else modules
    saved, unfit = as_linear(model, fields, saved, PREFIX)
    layers, unplaced = _by_layer(model, fields["peft_type"], {**saved, **adapted})
    faults += misnamed + misfits + unfit + unplaced
    if not layers and any(row.bare for row in rows_of(fields["peft_type"])):
        paths_named, unclear = named(fields, find(model, "linear", kinds))
        layers, faults = {path: {} for path in paths_named}, faults + unclear
    paths = {path for path, _ in model.named_modules()}
    faults = (
        faults
        or whole.faults_of(model, fields, modules)
        or ([] if layers or modules or rows else ["no tensors"])
        or shared.faults_of(fields["peft_type"], common)
        or _layer_faults(model, layers, kinds)
        or [
            fault
            for path in (*layers, *whole.paths_of(modules), *rows)
            if (fault := twice.fault(model, path.rpartition(".")[0] if path not in paths else path))
        ]
    )
    _require(faults, folder, model)
    chosen = {path: (row, row.config(**values)) for path, (row, values) in _choose(fields, layers).items()}
    _require(_misread(model, chosen, kinds), folder, model)
    configs = [*_merged_configs(chosen), *whole.configs_of(modules), *tokens.configs_of(rows), *_bitfit(shifts)]
    adapt = _with_constants(build(model, configs, remat=remat, kinds=kinds), chosen, layers, common, fields.get("task_type"))
    pairs = [(t, cfg) for t, cfg in zip(adapt.targets, adapt.configs) if t.path in chosen]
    reasons = ((t.path, cfg, unsaved(model, t, cfg)) for t, cfg in pairs)  # PEFT computes something else there
    _require([f'"{path}": {type(cfg).__name__} {why}' for path, cfg, why in reasons if why], folder, model)
    theirs = {path: _theirs(row, layers[path]) for path, (row, _) in chosen.items()}
    theirs = {path: row.completed(cfg, theirs[path]) for path, (row, cfg) in chosen.items()}
    sharing = {cfg.name: (row, cfg) for row, cfg in chosen.values() if row.shared_leaves}
    theirs |= {name: {n: common[leaf.key] for n, leaf in row.shared_leaves.items()} for name, (row, _) in sharing.items()}
    shapes = {place: adapt.shapes[place] for place in theirs}
    _require(tree_faults(theirs, shapes) + _field_faults(fields, layers, chosen), folder, model)
    ours = {path: _ours(adapt, model, path, row, theirs[path]) for path, (row, _) in chosen.items()}
    ours |= {name: _shared_ours(adapt, model, row, cfg, theirs[name]) for name, (row, cfg) in sharing.items()}
    return adapt, ours | whole.displacements(model, modules) | tokens.displacements(model, rows) | shifts


def _require(faults: list[str], folder: Path, model: nn.Module) -> None:
    if faults:
        raise ValueError(
            f'from_peft: expected "{folder}" to fit this {type(model).__name__}, found:\n{several(faults)}\n'
            "Pass the model that PEFT wrapped, and files as its save_pretrained wrote them."
        )


def _read_fields(place: Path) -> dict[str, Any]:
    if not place.is_file():
        raise FileNotFoundError(f'from_peft: expected a file at "{place}", found none. Pass the folder that was given to save_pretrained.')
    try:
        return dict(json.loads(place.read_text("utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f'from_peft: expected "{place}" to be a JSON object, found a damaged one ({e}). Save the adapter again.') from e


def _read_tensors(place: Path) -> dict[str, Tensor]:
    if not place.is_file():
        raise FileNotFoundError(
            f'from_peft: expected a file at "{place}", found none. Save with safe_serialization=True; pickled files are never opened.'
        )
    try:
        with safetensors.safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except Exception as e:
        raise ValueError(f'from_peft: expected "{place}" to be a whole safetensors file, found {e}. Save the adapter again.') from e


def _zeros(method: str) -> set[str]:
    return {key for row in rows_of(method) for key in row.zeros}


def _leaves(method: str) -> dict[str, Leaf]:
    return {leaf.key: leaf for row in rows_of(method) for leaf in (*row.leaves.values(), *row.constants.values())}


def _by_layer(model: nn.Module, method: str, tensors: Mapping[str, Tensor]) -> tuple[Layers, list[str]]:
    """Sort tensors by the path of their layer, and list those that have no place."""
    keys, zeros = _leaves(method), _zeros(method)
    ending = re.compile(rf"{re.escape(PREFIX)}(?:(.*)\.)?({'|'.join(map(re.escape, (*keys, *zeros)))})")
    layers: Layers = {}
    faults = []
    for name, tensor in tensors.items():
        found = ending.fullmatch(name)
        if found is None:
            faults.append(f'unexpected "{name}"')
            continue
        path, key = found[1] or "", found[2]
        if key in zeros:
            faults += [f'"{name}": expected zeros'] if tensor.count_nonzero() else []
            continue
        expected = keys[key].misfit(tensor, axes_of(model, path))
        if expected is not None:
            faults.append(f'"{name}": expected {expected}, found {tuple(tensor.shape)} of {tensor.dtype}')
        layers.setdefault(path, {})[key] = tensor
    return layers, faults


def _layer_faults(model: nn.Module, layers: Layers, kinds: Sequence[type[Kind]]) -> list[str]:
    modules, linear = dict(model.named_modules()), find(model, "linear", kinds)
    faults = []
    for path in layers:
        if path not in linear:
            found = type(modules[path]).__name__ if path in modules else f"nothing; closest: {nearest(path, linear)}"
            faults.append(f'"{path}": expected a linear layer, found {found}')
    return faults


def _bitfit(shifts: Tree) -> list[AdapterConfig]:
    return [BitFitConfig(target_names=tuple(f"^{re.escape(path)}$" for path in shifts), exclude_names=())] if shifts else []


def _misread(model: nn.Module, chosen: Chosen, kinds: Sequence[type[Kind]]) -> list[str]:
    linear = find(model, "linear", kinds)
    reasons = {path: row.misread(linear[path]) for path, (row, _) in chosen.items()}
    return [f'"{path}": {type(chosen[path][1]).__name__}: {reason}' for path, reason in reasons.items() if reason]


def _choose(fields: Mapping[str, Any], layers: Layers) -> dict[str, tuple[Row, dict[str, Any]]]:
    """Find each layer's variant and its config's values.

    Raises:
        ValueError: where a layer lacks tensors of its variant, or has others.
    """
    chosen, faults = {}, []
    for path, tensors in layers.items():
        row = next(row for row in rows_of(fields["peft_type"]) if row.when(fields, tensors))
        held = [*row.held(lambda field: resolve(fields, field, "") not in OFF).values(), *row.constants.values()]
        wrong = [f'missing "{join(path, key)}"' for key in sorted({leaf.key for leaf in held if not leaf.optional} - set(tensors))]
        wrong += [f'unexpected "{join(path, key)}"' for key in sorted(set(tensors) - {leaf.key for leaf in held})]
        faults += wrong
        if not wrong:
            chosen[path] = row, _values(row, fields, path, tensors)
    if faults:
        raise ValueError(
            f"from_peft: expected {WEIGHTS} to hold the tensors that {CONFIG} describes, found:\n{several(faults)}\nSave the adapter again."
        )
    return chosen


def _values(row: Row, fields: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    dtypes = [tensor.dtype for tensor in tensors.values()]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32  # PEFT keeps half precision as float32 too
    return {**row.read(fields, path, tensors), "dtype": dtype, "target_names": (f"^{re.escape(path)}$",), "exclude_names": ()}


def _merged_configs(chosen: Chosen) -> list[AdapterConfig]:
    """Return one config for all layers that agree in everything but their names."""
    groups: dict[AdapterConfig, list[str]] = {}
    for _, cfg in chosen.values():
        groups.setdefault(dataclasses.replace(cfg, target_names=()), []).extend(cfg.target_names)
    return [dataclasses.replace(cfg, target_names=tuple(names)) for cfg, names in groups.items()]


def _with_constants(adapt: Adapt, chosen: Chosen, layers: Layers, shared: Mapping[str, Tensor], task: str | None) -> Adapt:
    """Take constants that the file holds from there, and its task: the weight may have changed since they were derived."""
    plan = adapt._plan
    constants, common = dict(plan.constants), dict(plan.shared)
    layer = {target.path: target.kind.at(plan.base, target.path) for target, _ in plan.entries}
    for path, (row, cfg) in chosen.items():
        kept = {name: leaf.key for name, leaf in row.constants.items() if leaf.key in layers[path] and name in constants[path]}
        _require_implied(path, {name: layers[path][key] for name, key in kept.items() if row.constants[name].implied}, constants[path])
        loaded = _replaced(constants[path], {name: (join(path, key), layers[path][key]) for name, key in kept.items()})
        follow = row.settled(layer[path], loaded) if kept else {}
        constants[path] = {**loaded, **{name: c.to(layer[path].device) for name, c in follow.items()}}
        found = {name: (key, shared[key]) for name, key in row.shared.items() if key in shared}
        if found:
            common[cfg.name] = _replaced(common[cfg.name], found)
    return Adapt(dataclasses.replace(plan, constants=constants, shared=common, task_type=task))


def _require_implied(path: str, found: Mapping[str, Tensor], derived: Constants) -> None:
    for name, tensor in found.items():
        want = derived[name].tolist()
        if tensor.tolist() != want:
            way = "Pass the model that PEFT wrapped."
            raise ValueError(f'from_peft: expected {name} {want} at "{path}", as its weight implies, found {tensor.tolist()}. {way}')


def _replaced(derived: Constants, loaded: Mapping[str, tuple[str, Tensor]]) -> Constants:
    for name, (key, tensor) in loaded.items():
        if tensor.shape != derived[name].shape:
            want, found = tuple(derived[name].shape), tuple(tensor.shape)
            raise ValueError(f'from_peft: expected "{key}" of shape {want}, found {found}. Pass the model that PEFT wrapped.')
    return {**derived, **{name: tensor.to(derived[name], copy=True) for name, (_, tensor) in loaded.items()}}


def _field_faults(fields: Mapping[str, Any], layers: Layers, chosen: Chosen) -> list[str]:
    """List fields that the tensors contradict."""
    faults = []
    for path, (row, cfg) in chosen.items():
        rank = (getattr(cfg, "r", None) or row.write(cfg)["r"]) if "r" in DEFAULTS[row.peft_type] else None
        if rank is not None and resolve(fields, "r", path) != rank:
            faults.append(f'r or rank_pattern: expected {rank} at "{path}", as its tensors have, found {resolve(fields, "r", path)}')
        if fields.get("coft") and not _within_bound(layers[path]["oft_R.weight"], cfg, resolve(fields, "eps", path)):
            faults.append(f'coft: expected it off, or rotations within its bound, found "{path}" beyond it: PEFT would change its numbers')
    return faults


def _within_bound(v: Tensor, cfg: Any, eps: float) -> bool:
    return torch.allclose(project(v, cfg.block_size, eps), v, rtol=1e-5, atol=0.0)


def _theirs(row: Row, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors under our names, flat where ours are."""
    present = {name: leaf for name, leaf in row.leaves.items() if leaf.key in tensors}
    return {name: tensors[leaf.key].flatten() if leaf.shape else tensors[leaf.key] for name, leaf in present.items()}


def _ours(adapt: Adapt, model: nn.Module, path: str, row: Row, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    cfg = dict(zip((t.path for t in adapt.targets), adapt.configs))[path]
    W = next(t.kind.at(model, path) for t in adapt.targets if t.path == path)
    constants = row.derived(cfg, W, {**adapt.constants[path], **own_bias(W)})
    theirs = {name: t.to(W.device, cfg.dtype, copy=True) for name, t in theirs.items()}
    signs = row.signs(theirs, constants)
    return {name: (signs.get(name, 1.0) * t - row.leaves[name].origin(cfg, constants)).to(cfg.dtype) for name, t in theirs.items()}


def _shared_ours(adapt: Adapt, model: nn.Module, row: Row, cfg: AdapterConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    constants = adapt.constants.get(cfg.name, {})
    first = next(target for target, own in zip(adapt.targets, adapt.configs) if own.name == cfg.name)
    device = first.kind.at(model, first.path).device
    return {
        name: (t.to(device, cfg.dtype, copy=True) - row.shared_leaves[name].origin(cfg, constants)).to(cfg.dtype)
        for name, t in theirs.items()
    }
