"""`to_peft`: an adapter and its params as PEFT's two files."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, require_type, several
from lora_lite.core.plan import Target
from lora_lite.files.card import write_card
from lora_lite.files.durable import replace, store
from lora_lite.files.peft import biases, diverted, ties, tokens, twice, whole
from lora_lite.files.peft.calls import barred
from lora_lite.files.peft.categories import gathered
from lora_lite.files.peft.config import Pairs, Written, fields_of
from lora_lite.files.peft.grouped import copies
from lora_lite.files.peft.hub import CONFIG, WEIGHTS
from lora_lite.files.peft.layers import as_saved, is_conv1d, unsaved
from lora_lite.files.peft.names import lost
from lora_lite.files.peft.numbered import unstacked
from lora_lite.files.peft.parts import PREFIX
from lora_lite.files.peft.row import Leaves, Row, as_it_is, own_bias
from lora_lite.files.peft.rows import ROWS
from lora_lite.files.peft.tasks import heads_of
from lora_lite.variants.full import FullConfig
from lora_lite.variants.ln_tuning import LNTuningConfig
from lora_lite.variants.tokens import TokensConfig


@made_alike
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
    adapt._require_stored(params, "to_peft")
    if not os.fspath(directory):
        raise FileNotFoundError('to_peft: expected the path of a folder, found an empty one. Name a folder, e.g. "." for this one.')
    folder = Path(directory)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f'to_peft: expected the parent of "{folder}" to exist, found none. Create it first.')
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'to_peft: expected a folder, found the file "{folder}". Name a folder.')
    write_files(adapt, params, folder)
    if card is not None:
        write_card(card, folder)


class Sorted(NamedTuple):
    """The targets of an adapter, by the place that they have in PEFT's files."""

    of_method: Pairs
    as_whole: Pairs
    as_bias: Pairs
    of_tokens: dict[str, TokensConfig]


def sorted_targets(adapt: Adapt) -> Sorted:
    """Return the targets in this order."""
    entries = list(zip(adapt.targets, adapt.configs))
    as_whole: Pairs = [(target, cfg) for target, cfg in entries if isinstance(cfg, FullConfig)]
    of_tokens = {target.path: cfg for target, cfg in entries if isinstance(cfg, TokensConfig)}
    of_method = [(target, cfg) for target, cfg in entries if not isinstance(cfg, FullConfig | TokensConfig)]
    as_bias = biases.beside(of_method) if any(row.peft_type == "LORA" for _, cfg in of_method if (row := _row(cfg))) else []
    return Sorted([entry for entry in of_method if entry not in as_bias], as_whole, as_bias, of_tokens)


def write_files(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], folder: Path, complete: bool = True) -> None:
    """Write the two files of `to_peft`.

    Args:
        adapt: the adapted model.
        params: a tree that fits it.
        folder: the folder to write to.
        complete: whether `adapt` has all modules of the base model.

    Raises:
        ValueError: as in `to_peft`.
    """
    found = sorted_targets(adapt)
    require_expressible(found, adapt)
    layers, tensors = tensors_of(adapt, params, found)
    fields = fields_of(adapt, layers, found.as_whole, found.of_tokens, complete)
    if found.as_bias or any(getattr(cfg, "bias", False) for _, cfg in found.of_method):
        fields["bias"] = "all" if found.as_bias else "lora_only"
    _warn_of_lost(adapt, layers)
    heads = heads_of(adapt._plan.base, fields["task_type"], [target.path for target, _ in found.as_whole])
    _write(folder, fields, {**{PREFIX + key: t for key, t in heads.items()}, **tensors})


def _warn_of_lost(adapt: Adapt, layers: list[Written]) -> None:
    """Warn of layers of LoRA that PEFT does not find again, in its own files either."""
    found = lost(adapt._plan.base, {t.kind.host(t.path): t for t, row, *_ in layers if row.peft_type == "LORA"})
    if found:
        path, new = next(iter(found.items()))
        warnings.warn(
            f"to_peft: PEFT with the transformers installed here loads the layers {listed(found)} without their adapters, as a table of "
            f'transformers makes "{new}" of "{path}". This is so for files that PEFT wrote too. ll.from_peft reads them. For others, '
            "merge them into the weights: adapt.merge(params).",
            stacklevel=4,
        )


def tensors_of(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], found: Sorted) -> tuple[list[Written], Leaves]:
    """Return the layers of the method in PEFT's terms, and the tensors of the file by key."""
    layers = [_written(target, cfg, copies(adapt._plan, params, target.path), adapt) for target, cfg in found.of_method]
    saved = [as_saved(adapt._plan.base, layer.target, layer.tensors, adapt.targets) for layer in layers]
    tensors = {PREFIX + key: t for one in saved for key, t in one.items()}
    for row in {layer.row.peft_type: layer.row for layer in layers}.values():
        tensors = gathered(tensors, row.of_sort, row.sort, PREFIX)
    for _, cfg in found.of_method:
        tensors |= {key: adapt.constants[cfg.name][name].cpu() for name, key in ROWS[cfg.name].shared.items()}
    tensors |= _shared(adapt, params, {cfg.name: cfg for _, cfg in found.of_method})
    for target, cfg in found.as_whole:
        values = whole.full_values(adapt._plan.base, target.path, cfg, params[target.path])
        tensors |= {PREFIX + key: t.contiguous().clone() for key, t in values.items()}
    for target, _ in found.as_bias:
        tensors |= {PREFIX + key: t for key, t in biases.saved(adapt._plan.base, target, params[target.path]).items()}
    rows = tokens.written(adapt._plan.base, params, found.of_tokens, alone=not found.of_method)
    return layers, {**tensors, **{PREFIX + key: t for key, t in rows.items()}}


def _row(cfg: AdapterConfig) -> Row | None:
    row = ROWS.get(cfg.name)
    return row if row is not None and row.config is type(cfg) else None


def require_expressible(found: Sorted, adapt: Adapt) -> None:
    """Raise where PEFT cannot express an adapter; the error names each target, variant or field."""
    entries, as_whole, as_bias, of_tokens = found
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
        if strange := [name for name in adapt.shapes[target.path] if "." in name]:  # of one map among several
            faults.append(f"{at} has tensors {listed(strange)}, which PEFT's {row.peft_type} has no names for: it adapts one map a layer")
            continue
        if is_conv1d(target) and not row.conv1d:
            faults.append(f"{at} on a Conv1D: PEFT's {row.peft_type} takes nn.Linear alone")
        unable = barred(adapt._plan.base, target, row.peft_type) or unsaved(adapt._plan.base, target, cfg)
        unable = unable or diverted.fault(adapt._plan.base, target, cfg, row.peft_type)
        unable = unable or row.unsure(cfg, target.kind.at(adapt._plan.base, target.path))
        if row.written is as_it_is:  # else the file holds another variant
            fields = {"peft_type": row.peft_type, **row.write(cfg)}
            reasons = row.misread(target.kind), ties.shifted(adapt._plan.base, fields, target.path)
            faults += [f"{at}: {why}" for why in reasons if why]
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
    asked, faults = {target.path for target, _ in as_whole}, []
    if norms and entries:
        faults.append(f"LN-tuning at {listed(norms)} beside another method: a file of PEFT's holds one, and modules trained as a whole")
    if as_whole and not entries and not norms:
        faults.append("nothing but modules trained as a whole: PEFT has them beside a method only")
    for target, cfg in as_whole:
        again = twice.fault(adapt._plan.base, target.path)
        faults += [again] if again else []
        others = [path for path in whole.ambiguous(adapt._plan.base, target.path) if path not in asked]
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
        value = leaf.theirs(cfg, constants, value.detach())
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
            found[leaf.key] = leaf.theirs(cfg, constants, params[name][own].detach()).cpu()
    return {key: t.contiguous().clone() for key, t in unstacked(found).items()}


def _write(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        store(tensors, beside / WEIGHTS, folder / WEIGHTS, {"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
        folder.mkdir(exist_ok=True)
        replace([(beside / name, folder / name) for name in (WEIGHTS, CONFIG)])
    finally:
        shutil.rmtree(beside, ignore_errors=True)
