"""A file's tensors, sorted: those of layers, of modules trained as a whole, of tokens, of biases, and those that all layers share."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_lite.core.errors import listed, nearest
from lora_lite.core.tree import Tree
from lora_lite.files.peft import biases, numbered, rows_lora, shared, ties, tokens, twice, whole
from lora_lite.files.peft.adapter_name import without_name
from lora_lite.files.peft.categories import spread
from lora_lite.files.peft.fields import UNDROPPED
from lora_lite.files.peft.layers import as_linear, axes_of, unread, with_weights
from lora_lite.files.peft.names import in_names_of
from lora_lite.files.peft.row import Leaf
from lora_lite.files.peft.rows import rows_of
from lora_lite.files.peft.targeted import named
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind
from lora_lite.prepare.worn import wrappers
from lora_lite.variants.full import FullConfig

PREFIX = "base_model.model."

Layers = dict[str, dict[str, Tensor]]


class Parts(NamedTuple):
    """The tensors of a file, and its fields in the model's names.

    Attributes:
        fields: of PEFT's config.
        layers: tensors by layer and by key.
        modules: full values of modules, by our config of them.
        rows: of embeddings, by path.
        shifts: params of BitFit, of layers without another method.
        common: tensors that all layers share, by whole keys.
        idle: paths of the layers to which PEFT left nothing to train.
        faults: what has no place or does not fit.
    """

    fields: Mapping[str, Any]
    layers: Layers
    modules: whole.Whole
    rows: Mapping[str, tokens.Rows]
    shifts: Tree
    common: Mapping[str, Tensor]
    idle: set[str]
    faults: list[str]


def parts_of(model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], kinds: Sequence[type[Kind]]) -> Parts:
    """Sort the tensors of a file of PEFT's."""
    method = fields["peft_type"]
    keys = [*_leaves(method), *_zeros(method)]
    of_all = {leaf.key: leaf for row in rows_of(method) for leaf in row.shared_leaves.values()}
    unnamed = without_name(tensors, keys)
    saved = numbered.joined(unnamed, {**_leaves(method), **of_all})
    for row in rows_of(method):
        saved = spread(saved, row.of_sort, row.sort, PREFIX) if row.of_sort else saved
    common, saved = shared.split(method, saved)
    fields, saved, misnamed = in_names_of(model, fields, saved, PREFIX, keys, kinds)
    embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    fields = {**with_weights(model, fields), UNDROPPED: embeddings}
    saved, faults = twice.at_first_place(model, saved, PREFIX)
    modules, saved, unlike = whole.split(model, fields, saved, PREFIX)
    rows, saved, misfits = tokens.split(model, fields, saved, PREFIX)
    saved, repeated = biases.without_copies(model, modules.get(FullConfig, {}), saved, PREFIX)
    trained = biases.split(model, fields, saved, PREFIX, _trains_bias(fields))
    shifts, more = biases.of_layers(model, trained, PREFIX, kinds)
    modules = {**modules, FullConfig: {**modules.get(FullConfig, {}), **more}} if more else modules
    saved, unfit = as_linear(model, fields, trained.rest, PREFIX)
    layers, unplaced = _by_layer(model, method, {**saved, **trained.adapted})
    layers = {path: dict(rows_lora.positive(fields, path, own)) for path, own in layers.items()}
    clashes = ties.faults(model, fields, [*layers, *whole.paths_of(modules)], rows)
    faults += _scattered(method, unnamed) or clashes or misnamed + unlike + misfits + repeated + trained.faults + unfit + unplaced
    if not layers and any(row.bare for row in rows_of(method)):
        paths_named, unclear = named(fields, find(model, "linear", kinds))
        nothing = [] if paths_named else ["target_modules: expected names of layers of this model, found none that it has"]
        layers, faults = {path: {} for path in paths_named}, faults + (unclear or nothing)
    paths = {path for path, _ in model.named_modules()}
    faults = (
        faults
        or whole.faults_of(model, fields, modules)
        or ([] if layers or modules or rows else ["no tensors"])
        or _idle_faults(_at_work(method, layers), layers, modules, rows)
        or shared.faults_of(method, common)
        or _layer_faults(model, method, layers, kinds)
        or [
            fault
            for path in (*layers, *whole.paths_of(modules), *rows)
            if (fault := twice.fault(model, path.rpartition(".")[0] if path not in paths else path))
        ]
    )
    working = _at_work(method, layers)
    return Parts(fields, working, modules, rows, shifts, common, set(layers) - set(working), faults)


def _scattered(method: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the fault of a file without numbers, or with tensors without them where PEFT leaves none so."""
    hollow = tuple(f".{key}" for key, leaf in _leaves(method).items() if leaf.hollow)
    empty = [name for name, t in tensors.items() if t.shape == (0,) and not name.endswith(hollow)]
    names = [] if any(row.idles for row in rows_of(method)) else empty
    if tensors and not names:
        return []
    return [
        f"no {f'numbers in {listed(names)}' if names else 'tensors'}, as where DeepSpeed's ZeRO 3 had the params in parts when they were "
        "saved. Gather them: by stage3_gather_16bit_weights_on_model_save in its config, or those of a checkpoint by its zero_to_fp32.py"
    ]


def _at_work(method: str, layers: Layers) -> Layers:
    """Leave out the layers to which PEFT left nothing to train, by a rank or a width that it lowered."""
    if not any(row.idles for row in rows_of(method)):
        return layers
    return {path: own for path, own in layers.items() if any(t.numel() for t in own.values())}


def _idle_faults(working: Layers, layers: Layers, *others: Mapping[Any, Any]) -> list[str]:
    if working or not layers or any(others):
        return []
    return [f'"{path}": nothing to train, as PEFT lowered its rank or its blocks: the model as it is computes the same' for path in layers]


def _trains_bias(fields: Mapping[str, Any]) -> bool:
    """Whether the variant of a file of LoRA has a layer's own bias among its params."""
    row = next((row for row in rows_of(fields["peft_type"]) if row.peft_type == "LORA" and row.when(fields, {})), None)
    return row is not None and any(leaf.key == biases.ADAPTED for leaf in row.leaves.values())


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
            faults.append(unread(model, method, name.removeprefix(PREFIX)) or f'unexpected "{name}"')
            continue
        path, key = found[1] or "", found[2]
        if key in zeros:
            faults += [f'"{name}": expected zeros'] if tensor.count_nonzero() else []
            continue
        expected = keys[key].misfit(tensor, axes_of(model, path))
        if expected is not None:
            other = f'"{name}": expected {expected}, found {tuple(tensor.shape)} of {tensor.dtype}'
            faults.append(unread(model, method, name.removeprefix(PREFIX)) or other)
        layers.setdefault(path, {})[key] = tensor
    return layers, list(dict.fromkeys(faults))


def _layer_faults(model: nn.Module, method: str, layers: Layers, kinds: Sequence[type[Kind]]) -> list[str]:
    modules, linear, worn = dict(model.named_modules()), find(model, "linear", kinds), wrappers(model)
    faults = []
    for path in layers:
        if path not in linear:
            found = type(modules[path]).__name__ if path in modules else f"nothing; closest: {nearest(path, linear)}"
            found = f"an adapter of another library around it ({found})" if path in worn else found
            faults.append(unread(model, method, f"{path}.") or f'"{path}": expected a linear layer, found {found}')
    return list(dict.fromkeys(faults))
