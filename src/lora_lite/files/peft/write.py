"""`to_peft`: an adapter and its params as PEFT's two files."""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.config import AdapterConfig
from lora_lite.core.device import made_on_cpu
from lora_lite.core.errors import listed, require_type, several
from lora_lite.core.plan import Target
from lora_lite.files.card import write_card
from lora_lite.files.durable import replace
from lora_lite.files.peft import biases, tokens, twice, whole
from lora_lite.files.peft.categories import gathered
from lora_lite.files.peft.fields import BY_PATH, PATTERNS
from lora_lite.files.peft.grouped import copies
from lora_lite.files.peft.hub import CONFIG, WEIGHTS
from lora_lite.files.peft.layers import as_saved, is_conv1d, is_parameter, unsaved
from lora_lite.files.peft.numbered import unstacked
from lora_lite.files.peft.parts import PREFIX
from lora_lite.files.peft.row import Leaves, Row, own_bias
from lora_lite.files.peft.rows import ROWS
from lora_lite.files.peft.targeted import expression, listed_or_expressed
from lora_lite.files.peft.tasks import heads_of, task_of
from lora_lite.variants.full import FullConfig
from lora_lite.variants.ln_tuning import LNTuningConfig
from lora_lite.variants.tokens import TokensConfig

Pairs = list[tuple[Target, AdapterConfig]]

VERSION = "0.18.0"
"""The oldest PEFT that reads these files as they are meant: OFT's series was another before."""

OF_TYPE: dict[str, dict[str, Any]] = {
    "LORA": {"bias": "none"},
    "IA3": {"feedforward_modules": []},
    "DELORA": {"bias": "none"},
    "HRA": {"bias": "none"},
    "BEFT": {},
    "ROAD": {},
    "OFT": {"bias": "none"},
    "PSOFT": {},
    "VERA": {"bias": "none", "save_projection": True},
    "PVERA": {"bias": "none", "save_projection": True},
    "RANDLORA": {"bias": "none", "save_projection": True},
    "VBLORA": {"bias": "none", "save_only_topk_weights": False},
    "TINYLORA": {"bias": "none", "save_projection": True},
    "UNILORA": {"bias": "none", "save_indices": True},
    "FROD": {"bias": "none", "save_projection": True},
    "ADALORA": {"bias": "none"},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"bias": "none"},
    "SHIRA": {},
    "HIRA": {},
    "GRALORA": {"bias": "none"},
    "BOFT": {"bias": "none"},
    "C3A": {"bias": "none"},
    "FOURIERFT": {"bias": "none"},
    "WAVEFT": {"bias": "none", "wavelet_family": "db1"},
    "TRAINABLE_TOKENS": {},
    "DEFT": {"bias": "none", "init_weights": True},
    "PEANUT": {},
    "OSF": {},
    "ADAMSS": {"init_weights": "orthogonal"},
    "GLORA": {"bias": "none"},
    "LILY": {},
    "SUPERTUNING": {"save_precomputed_indices": True},
}
"""Fields that are the same in every file of a PEFT type."""


class Written(NamedTuple):
    """A layer in PEFT's terms."""

    target: Target
    row: Row
    fields: dict[str, Any]
    tensors: Leaves


@made_on_cpu
def to_peft(
    adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], directory: str | os.PathLike[str], *, card: str | None = None
) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained(model, directory)` gives the same outputs.

    The page on PEFT lists the methods, and which of them PEFT's files hold as another one: PiSSA and its like are written as LoRA of
    twice the rank, which acts on the weight as it is. Targets of `FullConfig` become `modules_to_save`. Both files are written beside
    their place and moved, so that neither is ever half-written.

    Args:
        adapt: the adapted model of the params.
        params: a tree that fits it.
        directory: the folder to write to; it is made where it does not exist, its parent must.
        card: the text of a `README.md` beside the files, such as `model_card(adapt, params)`; one that is there already is kept, with a
            warning. None for none.

    Raises:
        TypeError: where an argument is of another type, as in another order.
        ValueError: where `params` does not fit `adapt`, or PEFT cannot express it; it names each target, variant or field.
        FileNotFoundError: where the parent of the directory does not exist.
    """
    call = "to_peft(adapt, params, directory)"
    require_type(isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)
    require_type(isinstance(params, Mapping), call, "params", "a params tree, e.g. adapt.init()", params)
    require_type(isinstance(directory, str | os.PathLike), call, "directory", "the path of a folder", directory)
    require_type(card is None or isinstance(card, str), call, "card", "text, e.g. model_card(adapt, params)", card)
    adapt._require(params, "to_peft")
    folder = Path(directory)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f'to_peft: expected the parent of "{folder}" to exist, found none. Create it first.')
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'to_peft: expected a folder, found the file "{folder}". Name a folder.')
    entries = list(zip(adapt.targets, adapt.configs))
    as_whole: Pairs = [(target, cfg) for target, cfg in entries if isinstance(cfg, FullConfig)]
    of_tokens = {target.path: cfg for target, cfg in entries if isinstance(cfg, TokensConfig)}
    of_method = [(target, cfg) for target, cfg in entries if not isinstance(cfg, FullConfig | TokensConfig)]
    as_bias = biases.beside(of_method) if any(row.peft_type == "LORA" for _, cfg in of_method if (row := _row(cfg))) else []
    of_method = [entry for entry in of_method if entry not in as_bias]
    _refuse(of_method, as_whole, as_bias, of_tokens, adapt)
    layers = [_written(target, cfg, copies(adapt._plan, params, target.path), adapt) for target, cfg in of_method]
    saved = [as_saved(adapt._plan.base, layer.target, layer.tensors, adapt.targets) for layer in layers]
    tensors = {PREFIX + key: t for one in saved for key, t in one.items()}
    for row in {layer.row.peft_type: layer.row for layer in layers}.values():
        tensors = gathered(tensors, row.of_sort, row.sort, PREFIX)
    for _, cfg in of_method:
        tensors |= {key: adapt.constants[cfg.name][name].cpu() for name, key in ROWS[cfg.name].shared.items()}
    tensors |= _shared(adapt, params, {cfg.name: cfg for _, cfg in of_method})
    for target, cfg in as_whole:
        values = whole.full_values(adapt._plan.base, target.path, cfg, params[target.path])
        tensors |= {PREFIX + key: t.contiguous().clone() for key, t in values.items()}
    for target, _ in as_bias:
        tensors |= {PREFIX + key: t for key, t in biases.saved(adapt._plan.base, target, params[target.path]).items()}
    tensors |= {PREFIX + key: t for key, t in tokens.written(adapt._plan.base, params, of_tokens, alone=not of_method).items()}
    fields = _fields(adapt, layers, as_whole, of_tokens)
    if as_bias or any(getattr(cfg, "bias", False) for _, cfg in of_method):
        fields["bias"] = "all" if as_bias else "lora_only"
    heads = heads_of(adapt._plan.base, fields["task_type"], [target.path for target, _ in as_whole])
    _write(folder, fields, {**{PREFIX + key: t for key, t in heads.items()}, **tensors})
    if card is not None:
        write_card(card, folder)


def _row(cfg: AdapterConfig) -> Row | None:
    row = ROWS.get(cfg.name)
    return row if row is not None and row.config is type(cfg) else None


def _refuse(entries: Pairs, as_whole: Pairs, as_bias: Pairs, of_tokens: Mapping[str, TokensConfig], adapt: Adapt) -> None:
    faults = _whole_faults(entries, as_whole, adapt)
    types = sorted({row.peft_type for _, cfg in entries if (row := _row(cfg))})
    faults += tokens.unwritable(adapt._plan.base, of_tokens, types, [target.path for target, _ in as_whole])
    asked = [*as_bias, *((target, cfg) for target, cfg in entries if getattr(cfg, "bias", False))]
    lacking = [(target, cfg, biases.fault(adapt._plan.base, target, cfg)) for target, cfg in asked]
    faults += [f'"{target.path}": {type(cfg).__name__}: {reason}' for target, cfg, reason in lacking if reason]
    for target, cfg in entries:
        row, at = _row(cfg), f'"{target.path}": {type(cfg).__name__}'
        if row is None:
            faults.append(f"{at} has no class in PEFT")
            continue
        reason = row.refused(cfg)
        faults += [f"{at}.{reason}"] if reason else []
        if is_conv1d(target) and not row.conv1d:
            faults.append(f"{at} on a Conv1D: PEFT's {row.peft_type} takes nn.Linear alone")
        unable = unsaved(adapt._plan.base, target, cfg)
        faults += [f"{at} {unable}"] if unable else []
        if not target.path:
            faults.append("the model itself is the layer: PEFT adapts layers inside a model")
        elif not target.kind.host(target.path):
            faults.append(f'"{target.path}": a parameter of the model itself: PEFT adapts parameters of modules inside a model')
        again = twice.fault(adapt._plan.base, target.kind.host(target.path))
        faults += [again] if again else []
    if len(types) > 1:
        faults.append(f"variants of {len(types)} methods, {listed(types)}: a file of PEFT's holds one")
    if faults:
        raise ValueError(
            f"to_peft: expected an adapter that one of PEFT's configs can express, found:\n{several(faults)}\n"
            "Keep it with ll.save, or convert linear variants with ll.to_lora first."
        )


def _whole_faults(entries: Pairs, as_whole: Pairs, adapt: Adapt) -> list[str]:
    norms = [target.path for target, cfg in as_whole if isinstance(cfg, LNTuningConfig)]
    faults = []
    if norms and entries:
        faults.append(f"LN-tuning at {listed(norms)} beside another method: a file of PEFT's holds one, and modules trained as a whole")
    if as_whole and not entries and not norms:
        faults.append("nothing but modules trained as a whole: PEFT has them beside a method only")
    for target, cfg in as_whole:
        again = twice.fault(adapt._plan.base, target.path)
        faults += [again] if again else []
        others = whole.ambiguous(adapt._plan.base, target.path)
        if others:
            faults.append(f'"{target.path}": {type(cfg).__name__}: PEFT goes by the end of a name and would take {listed(others)} too')
    return faults


def _written(target: Target, cfg: AdapterConfig, leaves: Leaves, adapt: Adapt) -> Written:
    path = target.path
    layer = adapt._plan.layer(target, cfg)
    constants = ROWS[cfg.name].derived(cfg, layer, {**adapt._plan.constants_at(path, cfg), **own_bias(layer)})
    cfg, leaves = ROWS[cfg.name].written(cfg, leaves, constants)
    row = ROWS[cfg.name]
    tensors = {}
    for name, value in leaves.items():
        leaf = row.leaves[name]
        value = value.detach() + leaf.origin(cfg, constants)
        tensors[leaf.key] = value.reshape(leaf.shape) if leaf.shape else value
    tensors |= {row.constants[name].key: t for name, t in row.saved(target.i, constants).items()}
    for key, axes in row.zeros.items():
        if not any(other.startswith(f"{key.rpartition('.')[0]}.") for other in tensors):
            tensors[key] = torch.zeros([{"i": target.i, "o": target.o}.get(axis, 1) for axis in axes])
    return Written(target, row, row.write(cfg), {key: t.cpu().contiguous().clone() for key, t in row.apart(tensors, constants).items()})


def _shared(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, AdapterConfig]) -> Leaves:
    """Return the trained tensors that all layers of a variant share, with their whole keys."""
    found: Leaves = {}
    for name, cfg in configs.items():
        constants = adapt.constants.get(name, {})
        for own, leaf in ROWS[name].shared_leaves.items():
            found[leaf.key] = (params[name][own].detach() + leaf.origin(cfg, constants)).cpu()
    return {key: t.contiguous().clone() for key, t in unstacked(found).items()}


def _fields(adapt: Adapt, layers: list[Written], as_whole: Pairs, of_tokens: Mapping[str, TokensConfig]) -> dict[str, Any]:
    """Return the fields of PEFT's config: common values, and patterns where layers may differ.

    Raises:
        ValueError: where layers differ in a field that PEFT has once.
    """
    norms = [target.path for target, cfg in as_whole if isinstance(cfg, LNTuningConfig)]
    modules = [target.path for target, cfg in as_whole if not isinstance(cfg, LNTuningConfig)]
    method = layers[0].row.peft_type if layers else whole.LN_TUNING if norms else tokens.TRAINABLE_TOKENS
    task = adapt._plan.task_type or task_of(adapt._plan.base, [layer.target.path for layer in layers])
    fields = {"peft_type": method, "peft_version": VERSION, "task_type": task, "inference_mode": True, **OF_TYPE[method]}
    fields["base_model_name_or_path"] = getattr(getattr(adapt._plan.base, "config", None), "_name_or_path", None)
    fields |= {"modules_to_save": modules} if modules else {}
    chosen = [layer.target.path for layer in layers] or norms or list(of_tokens)
    of_path = {t.path: t for t in adapt.targets}
    parameters = [path for path in chosen if is_parameter(of_path[path])]
    besides = [path for path, _ in adapt._plan.base.named_modules() if path not in set(chosen)]
    fields["target_modules"] = listed_or_expressed([path for path in chosen if path not in parameters], besides)
    if layers:
        cfg = next(cfg for target, cfg in zip(adapt.targets, adapt.configs) if target.path == chosen[0])
        fields |= layers[0].row.named(cfg, chosen, besides)
    fields |= {"target_parameters": parameters} if parameters else {}
    fields |= tokens.fields_of(adapt._plan.base, of_tokens, alone=not layers) if of_tokens else {}
    if not layers:
        return fields
    if any(layer.row.conv1d for layer in layers):
        fields["fan_in_fan_out"] = any(is_conv1d(layer.target) for layer in layers)
    for lists in {layer.row.lists for layer in layers if layer.row.lists}:
        fields[lists] = expression([layer.target.path for layer in layers if layer.row.lists == lists])
    patterns, faults = PATTERNS.get(method, {}), []
    for name in dict.fromkeys(name for layer in layers for name in layer.fields):
        values = {layer.target.path: layer.fields.get(name) for layer in layers}
        fields[name] = Counter(values.values()).most_common(1)[0][0]
        others = {path: value for path, value in values.items() if value != fields[name]}
        if name in patterns:
            fields[patterns[name]] = {path if method in BY_PATH else f"^{re.escape(path)}$": value for path, value in others.items()}
            faults += _taken(name, values, others) if method in BY_PATH else []
        elif others:
            faults.append(f"{name}: {fields[name]!r} and {next(iter(others.values()))!r} at {listed(others)}")
    if faults:
        raise ValueError(
            f"to_peft: expected configs that agree in what PEFT has once for all layers, found:\n{several(faults)}\n"
            "Keep the adapter with ll.save, or convert it with ll.to_lora first."
        )
    return fields


def _taken(name: str, values: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """List the layers whose path ends in that of an exception, and which PEFT would give its value."""
    ends = [(path, end) for path in values for end in others if re.match(rf".*\.{end}$", path) and values[path] != others[end]]
    return [f'{name}: {others[end]!r} at "{end}", which PEFT takes for "{path}" too' for path, end in ends]


def _write(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        safetensors.torch.save_file(dict(tensors), beside / WEIGHTS, {"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
        folder.mkdir(exist_ok=True)
        replace([(beside / name, folder / name) for name in (WEIGHTS, CONFIG)])
    finally:
        shutil.rmtree(beside, ignore_errors=True)
