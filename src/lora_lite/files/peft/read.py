"""`from_peft`: PEFT's two files as an `adapt` and its params."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, require_type, several, tree_faults
from lora_lite.core.frozen import Constants
from lora_lite.core.leading import SVDConfig
from lora_lite.core.tree import Tree, join
from lora_lite.files.peft import grouped, shared, tokens, whole
from lora_lite.files.peft.demands import check_fields, unable
from lora_lite.files.peft.fields import DEFAULTS, OFF, of_patterns, resolve
from lora_lite.files.peft.hub import CONFIG, WEIGHTS, folder_of
from lora_lite.files.peft.layers import unsaved
from lora_lite.files.peft.older import present_fields, present_tensors
from lora_lite.files.peft.order import Chosen, warn_of_order
from lora_lite.files.peft.parts import Layers, Parts, parts_of
from lora_lite.files.peft.row import Row, is_lowered, own_bias
from lora_lite.files.peft.rows import rows_of
from lora_lite.files.peft.targeted import warn_of_absent
from lora_lite.files.safetensors_file import tensors_of, widened
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import as_kinds
from lora_lite.prepare.worn import refuse_unadaptable
from lora_lite.variants.bitfit import BitFitConfig
from lora_lite.variants.oft import project


@made_alike
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
    the methods. `modules_to_save` become targets of `FullConfig`. The layers are those that the file of tensors names, with a warning
    where `target_modules` names more. Layers with other hyperparameters get a config of their own.

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
        NotADirectoryError: where `directory` is a file.
        FileNotFoundError: where a file is missing, or neither a folder nor a repository is found.
        ModuleNotFoundError: where a repository is asked for and `huggingface_hub` is not installed.
        ValueError: where a file is damaged, is of another model, or asks for what is not supported; it names each field and tensor.
        TypeError: where an argument is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"from_peft: expected model as a torch.nn.Module, found {type(model).__name__}. Call from_peft(model, directory).")
    call = "from_peft(model, directory)"
    require_type(isinstance(directory, str | os.PathLike), call, "directory", "the path of a folder", directory)
    require_type(isinstance(subfolder, str), "from_peft(model, directory, subfolder=name)", "subfolder", "the name of a folder", subfolder)
    refuse_unadaptable(model)
    folder, kinds = folder_of(directory, revision, subfolder), as_kinds(kinds)
    fields = present_fields(_read_fields(folder / CONFIG))
    check_fields(fields, folder / CONFIG)
    parts = parts_of(model, fields, present_tensors(_read_tensors(folder / WEIGHTS)), kinds)
    _require(parts.faults, folder, model)
    chosen = {path: (row, _config(row, values, path, folder)) for path, (row, values) in _choose(parts.fields, parts.layers).items()}
    _require(_misread(model, chosen, kinds), folder, model, _MERGE)
    configs = [*_merged_configs(chosen), *whole.configs_of(parts.modules), *tokens.configs_of(parts.rows), *_bitfit(parts.shifts)]
    built = build(model, configs, remat=remat, kinds=kinds)
    _require(_undefined(model, built, chosen, parts.fields.get("target_parameters") or ()), folder, model, _RUN)
    adapt = _with_constants(built, chosen, parts)
    theirs = _theirs(chosen, parts)
    faults = tree_faults(theirs, grouped.shapes_of(adapt._plan, theirs)) + _field_faults(parts, chosen)
    _require(faults or grouped.differing(adapt._plan, theirs), folder, model)
    warn_of_order(parts, chosen)
    warn_of_absent(parts.fields, find(model, "linear", kinds), {t.kind.host(t.path) for t in adapt.targets} | parts.idle)
    others = whole.displacements(model, parts.modules) | tokens.displacements(model, parts.rows) | parts.shifts
    return adapt, adapt._plan.ordered(adapt._plan.regrouped(_ours(adapt, chosen, theirs)) | others)


_PASS = "Pass the model that the adapter was trained on, without layers of PEFT's (peft_model.unload() takes them off)"
_FIT = f"{_PASS}, and files as save_pretrained wrote them. Where a line above names another way, take that."
_MERGE = "Merge the adapter with PEFT's merge_and_unload and adapt the merged model."
_RUN = "Run the adapter by PEFT, or train one here with ll.build. Merged in PEFT it may compute something else than in training."
"""The way out where PEFT's layer computes otherwise than `W x + b` with another `W`."""


def _require(faults: list[str], folder: Path, model: nn.Module, way: str = _FIT) -> None:
    if faults:
        raise ValueError(f'from_peft: expected "{folder}" to fit this {type(model).__name__}, found:\n{several(faults)}\n{way}')


def _config(row: Row, values: Mapping[str, Any], path: str, folder: Path) -> Any:
    try:
        return row.config(**values)
    except (TypeError, ValueError) as e:
        found = f'"{folder / CONFIG}" to hold values that "{path}" can have here, found: {e}'
        raise ValueError(f"from_peft: expected {found} Correct a slip in the file. Where it was trained so: {_MERGE}") from e


def _read_fields(place: Path) -> dict[str, Any]:
    if not place.is_file():
        inside = sorted(str(other.parent.relative_to(place.parent)) for other in place.parent.glob(f"*/{CONFIG}"))
        way = f"Pass subfolder= one of {listed(inside)}." if inside else "Pass the folder that was given to save_pretrained."
        raise FileNotFoundError(f'from_peft: expected a file at "{place}", found none. {way}')
    try:
        fields = json.loads(place.read_text("utf-8"))
        if not isinstance(fields, dict):
            raise TypeError(f"a {type(fields).__name__}")
        return fields
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f'from_peft: expected "{place}" to be a JSON object, found a damaged one ({e}). Save the adapter again.') from e


def _read_tensors(place: Path) -> dict[str, Tensor]:
    if not place.is_file():
        raise FileNotFoundError(
            f'from_peft: expected a file at "{place}", found none. Where there is an adapter_model.bin, bring it into this form first, as '
            'pickled files are never opened here: safetensors.torch.save_file(torch.load("adapter_model.bin", weights_only=True), '
            f'"{place.name}").'
        )
    return widened(tensors_of("from_peft", place, "Save the adapter again.")[1])


def _bitfit(shifts: Tree) -> list[AdapterConfig]:
    return [BitFitConfig(target_names=tuple(f"^{re.escape(path)}$" for path in shifts), exclude_names=())] if shifts else []


def _undefined(model: nn.Module, adapt: Adapt, chosen: Chosen, asked: Sequence[str]) -> list[str]:
    """List the layers at which PEFT computes something else than the variant, or nothing."""
    pairs = [(t, cfg) for t, cfg in zip(adapt.targets, adapt.configs) if t.path in chosen]
    layers = _layers_of(adapt)
    reasons = [(t.path, cfg, unsaved(model, t, cfg, asked) or chosen[t.path][0].unsure(cfg, layers[t.path])) for t, cfg in pairs]
    return [f'"{path}": {type(cfg).__name__} {why}' for path, cfg, why in reasons if why]


def _misread(model: nn.Module, chosen: Chosen, kinds: Sequence[type[Kind]]) -> list[str]:
    linear = find(model, "linear", kinds)
    reasons = {path: row.misread(linear[path]) or unable(linear[path], cfg) for path, (row, cfg) in chosen.items()}
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
    derived = issubclass(row.config, SVDConfig) and not row.constants  # the file's numbers are for PEFT's own factors, which are exact
    return {
        **row.read(fields, path, tensors),
        **({"svd": "exact"} if derived else {}),
        **{"dtype": dtype, "target_names": (f"^{re.escape(path)}$",), "exclude_names": ()},
    }


def _merged_configs(chosen: Chosen) -> list[AdapterConfig]:
    """Return one config for all layers that agree in everything but their names."""
    groups: dict[AdapterConfig, list[str]] = {}
    for _, cfg in chosen.values():
        groups.setdefault(dataclasses.replace(cfg, target_names=()), []).extend(cfg.target_names)
    return [dataclasses.replace(cfg, target_names=tuple(names)) for cfg, names in groups.items()]


def _with_constants(adapt: Adapt, chosen: Chosen, parts: Parts) -> Adapt:
    """Take constants that the file holds from there, and its task: the weight may have changed since they were derived."""
    plan = adapt._plan
    constants, common, layers = dict(plan.constants), dict(plan.shared), _layers_of(adapt)
    for path, (row, cfg) in chosen.items():
        tensors = parts.layers[path]
        kept = {name: leaf.key for name, leaf in row.constants.items() if leaf.key in tensors and name in constants[path]}
        _require_implied(path, {name: tensors[key] for name, key in kept.items() if row.constants[name].implied}, constants[path])
        loaded = _replaced(constants[path], {name: (join(path, key), tensors[key]) for name, key in kept.items()})
        follow = row.settled(layers[path], loaded) if kept else {}
        constants[path] = {**loaded, **{name: c.to(layers[path].device) for name, c in follow.items()}}
        if present := {name: key for name, key in row.shared.items() if key in parts.common}:
            own = common[cfg.name]
            common[cfg.name] = _replaced(own, {n: (key, shared.leading(parts.common[key], own[n])) for n, key in present.items()})
    starts = {path: start for path, start in plan.starts.items() if not (path in chosen and chosen[path][0].constants)}
    return Adapt(dataclasses.replace(plan, constants=constants, shared=common, starts=starts, task_type=parts.fields.get("task_type")))


def _layers_of(adapt: Adapt) -> dict[str, Kind]:
    """Read the layers of all targets, by path."""
    return {target.path: target.kind.at(adapt._plan.base, target.path) for target in adapt.targets}


def _require_implied(path: str, found: Mapping[str, Tensor], derived: Constants) -> None:
    for name, tensor in found.items():
        want = derived[name].tolist()
        if tensor.tolist() != want:
            way = f"{_PASS}, with the weights that it had then."
            raise ValueError(f'from_peft: expected {name} {want} at "{path}", as its weight implies, found {tensor.tolist()}. {way}')


def _replaced(derived: Constants, loaded: Mapping[str, tuple[str, Tensor]]) -> Constants:
    for name, (key, tensor) in loaded.items():
        if tensor.shape != derived[name].shape:
            raise ValueError(f'from_peft: expected "{key}" of shape {tuple(derived[name].shape)}, found {tuple(tensor.shape)}. {_PASS}.')
    return {**derived, **{name: tensor.to(derived[name], copy=True) for name, (_, tensor) in loaded.items()}}


def _field_faults(parts: Parts, chosen: Chosen) -> list[str]:
    """List fields that the tensors contradict."""
    fields, faults = parts.fields, []
    for path, (row, cfg) in chosen.items():
        rank = (getattr(cfg, "r", None) or row.write(cfg)["r"]) if "r" in DEFAULTS[row.peft_type] else None
        ranks = (resolve(fields, "r", path), *of_patterns(fields, "r", path)) if rank is not None else ()
        if rank is not None and rank not in ranks and not (row.lowers and is_lowered(rank, ranks[0], parts.layers[path])):
            faults.append(f'r or rank_pattern: expected {rank} at "{path}", as its tensors have, found {resolve(fields, "r", path)}')
        if fields.get("coft") and not _within_bound(parts.layers[path]["oft_R.weight"], cfg, resolve(fields, "eps", path)):
            faults.append(f'coft: expected it off, or rotations within its bound, found "{path}" beyond it: PEFT would change its numbers')
    return faults


def _within_bound(v: Tensor, cfg: Any, eps: float) -> bool:
    return torch.allclose(project(v, cfg.block_size, eps), v, rtol=1e-5, atol=0.0)


def _sharing(chosen: Chosen) -> Chosen:
    """Return by name the variants whose layers share trained tensors."""
    return {cfg.name: (row, cfg) for row, cfg in chosen.values() if row.shared_leaves}


def _theirs(chosen: Chosen, parts: Parts) -> Tree:
    """Return PEFT's tensors by place and under our names, flat where ours are."""
    found: Tree = {}
    for path, (row, cfg) in chosen.items():
        tensors = parts.layers[path]
        present = {name: leaf for name, leaf in row.leaves.items() if leaf.key in tensors}
        own = {name: tensors[leaf.key].flatten() if leaf.shape else tensors[leaf.key] for name, leaf in present.items()}
        found[path] = row.completed(cfg, own)
    for name, (row, _) in _sharing(chosen).items():
        found[name] = {own: parts.common[leaf.key] for own, leaf in row.shared_leaves.items()}
    return found


def _ours(adapt: Adapt, chosen: Chosen, theirs: Tree) -> Tree:
    """Return PEFT's tensors as params: without their neutral values, signs aligned."""
    layers, found = _layers_of(adapt), Tree()
    for path, (row, cfg) in chosen.items():
        W = layers[path]
        constants = row.derived(cfg, W, {**adapt.constants[path], **own_bias(W)})
        own = {name: t.to(W.device, cfg.dtype, copy=True) for name, t in theirs[path].items()}
        signs = row.signs(own, constants)
        found[path] = {n: (signs.get(n, 1.0) * t - row.leaves[n].origin(cfg, constants)).to(cfg.dtype) for n, t in own.items()}
    for name, (row, cfg) in _sharing(chosen).items():
        constants = adapt.constants.get(name, {})
        device = next(layers[path].device for path, (_, own) in chosen.items() if own.name == name)
        moved = {n: t.to(device, cfg.dtype, copy=True) for n, t in theirs[name].items()}
        found[name] = {n: (t - row.shared_leaves[n].origin(cfg, constants)).to(cfg.dtype) for n, t in moved.items()}
    return found
