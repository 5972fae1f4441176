"""Params and config to one safetensors file and back. Nothing is unpickled, nothing half-written, nothing half-loaded."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.clone.checkpointing import check_pattern
from lora_lite.clone.structure import clone_module
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.config_json import from_json, to_file
from lora_lite.core.errors import listed, nearest, require_type, several, tree_faults
from lora_lite.core.plan import Entries, Plan, Target
from lora_lite.core.tree import Tree, flatten, join
from lora_lite.files.base_weights import fingerprint, rebase, report, values_at
from lora_lite.files.durable import require_file, store, written
from lora_lite.files.header import BASE, CONSTANT, Header, Stored, describe, tensor_faults, write_header
from lora_lite.files.inferred import follows
from lora_lite.files.stored import read as read
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import KINDS, SITES, as_kinds
from lora_lite.prepare.checks import check_entries
from lora_lite.prepare.derive import groups_of
from lora_lite.prepare.heads import new_heads
from lora_lite.prepare.targets import sharing
from lora_lite.prepare.worn import refuse_unadaptable
from lora_lite.variants import VARIANTS


@made_alike
def save(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], path: str | os.PathLike[str]) -> None:
    """Write params, constants and configs to one safetensors file.

    Params are named `<target path>.<name>`. Of modules trained as a whole (`FullConfig`, `LNTuningConfig`) the file holds the values that
    the params move too: such a module is itself again on any model of these shapes. The file is written beside its place, brought to the
    disk and renamed, so that whatever happens a file already there stays whole.

    Args:
        adapt: the adapted model of the params.
        params: a tree that fits it.
        path: the file to write; its directory must exist.

    Raises:
        TypeError: where an argument is of another type, as in another order.
        ValueError: where `params` does not fit `adapt`, or a module trained as a whole is of a sharded base.
        FileNotFoundError: where the directory does not exist.
        IsADirectoryError: where `path` is a directory.

    Example:
        >>> import os, tempfile, torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapt = ll.build(model, ll.LoRAConfig(r=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ll.save(adapt, adapt.init(seed=0), os.path.join(folder, "adapter.safetensors"))
        ...     again, params = ll.load(model, os.path.join(folder, "adapter.safetensors"))
        >>> again
        Adapt(Sequential, lora, 1 targets, 24 params)
    """
    call = "save(adapt, params, path)"
    require_type(isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)
    require_type(isinstance(params, Mapping), call, "params", "a params tree, e.g. adapt.init()", params)
    require_type(isinstance(path, str | os.PathLike), call, "path", "the path of a file", path)
    write(adapt, params, Path(path))


def write(adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], place: Path, weights: bool = True) -> None:
    """Write the file of `save`.

    Args:
        adapt: the adapted model.
        params: a tree that fits it.
        place: the file to write.
        weights: whether the model has the weights that the adapter stands on, of which the file then has fingerprints.
    """
    adapt._require(params, "save")
    adapt._require_stored(params, "save")
    require_file("save", place)
    params, entries = adapt._plan.ordered(params), adapt._plan.entries
    values = {t.path: found for t, cfg in entries if (found := values_at(adapt._plan, t, cfg))}
    marks = {t.path: mark for t, cfg in entries if weights and (mark := fingerprint(adapt._plan, t, cfg)) is not None}
    tensors = {name: _plain(leaf) for name, leaf in flatten(params).items()}
    tensors |= {CONSTANT + name: _plain(leaf) for name, leaf in flatten(adapt.constants).items()}
    tensors |= {BASE + name: _plain(leaf) for name, leaf in flatten(values).items()}
    configs = list({id(cfg): cfg for cfg in adapt.configs}.values())
    index = {id(cfg): k for k, cfg in enumerate(configs)}
    targets = {
        t.path: Stored(index[id(cfg)], t.i, t.o, t.role, describe(params[t.path]), describe(adapt.constants[t.path])) for t, cfg in entries
    }
    shared = {name: describe(constants) for name, constants in adapt.constants.items() if name not in targets}
    shared_params = {name: describe(params[name]) for name in adapt._plan.shared_params()}
    described = {path: describe(found) for path, found in values.items()}
    stored, classes = [to_file(cfg) for cfg in configs], _classes(configs)
    header = Header(stored, targets, shared, shared_params, described, marks, dict(adapt.starts), _layers(adapt), classes)
    with written(place) as beside:
        store(tensors, beside, place, write_header(header))


@made_alike
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    variants: Sequence[type[AdapterConfig]] | Mapping[str, type[AdapterConfig]] = (),
    remat: str | None = None,
    kinds: Sequence[type[Kind]] = (),
) -> tuple[Adapt, Tree]:
    """Read a file that `save` wrote and bind it to a model. Needs neither calibration data nor an SVD.

    Most variants add to the weights that the model has, and a fine-tuned model is as good a base as the one of the training. Where the file
    knows that a weight is another and that this changes the adapter, a `UserWarning` names the targets: those of variants that derived
    constants from the weight (DoRA's norms, PiSSA's start), and heads that the model has drawn anew. It is no error, since a base may be
    changed on purpose. A module trained as a whole takes the values that it had, whatever the model's own are.

    Args:
        model: the model that the adapter was trained on, or one of the same shapes.
        path: the file.
        variants: configs of variants from outside the package, as a sequence of classes or a mapping by name.
        remat: as in `build`.
        kinds: as in `build`.

    Returns:
        `(adapt, params)`; params on the devices of their layers, in the dtypes of the file.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where the file is damaged, foreign, of another format version or variant, or of another model; it lists each fault.
        TypeError: where an argument is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: expected model as a torch.nn.Module, found {type(model).__name__}. Call load(model, path).")
    require_type(isinstance(path, str | os.PathLike), "load(model, path)", "path", "the path of a file", path)
    known, kinds = _known(variants), as_kinds(kinds)
    check_pattern(model, remat, "load")
    adapt, params, header, tensors = bound(model, Path(path), known, remat, kinds)
    settle(model, Path(path), adapt, params, header, tensors)
    return adapt, params


def settle(
    model: nn.Module,
    path: Path,
    adapt: Adapt,
    params: Tree,
    header: Header,
    tensors: Mapping[str, Tensor],
    read: Callable[[], None] = lambda: None,
) -> None:
    """Compare the result of `bound` with the model's weights: whole modules take the values of the file, and a warning names others.

    `read` is called when a weight has been read.
    """
    values = {p: {name: tensors[BASE + join(p, name)] for name in names} for p, names in header.values.items()}
    rebase(adapt._plan, params, values)
    report(adapt._plan, header.weights, new_heads(model), path, read)


def bound(
    model: nn.Module,
    path: Path,
    known: Mapping[str, type[AdapterConfig]] = VARIANTS,
    remat: str | None = None,
    kinds: Sequence[type[Kind]] = (),
) -> tuple[Adapt, Tree, Header, dict[str, Tensor]]:
    """Read a file and bind it to a model, whatever weights the model has. Return the file's header and tensors too.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where the file is damaged, foreign or of another model.
    """
    refuse_unadaptable(model)
    header, tensors = read(path)
    configs = _configs(header, known, path)
    entries, faults = _entries(model, header.targets, configs, kinds)
    faults += tensor_faults(header, tensors)
    if not faults:
        check_entries(model, entries)
        adapt, params = _bind(clone_module(model, kinds), header, entries, tensors, remat, kinds)
        # With its constants at hand each variant says what its params must be: no SVD, no data.
        faults = tree_faults(params, _shapes(adapt.init()))
    if faults:
        strange = sorted({kind for kind, _ in header.layers.values()} - {kind.__name__ for kind in (*KINDS, *kinds)})
        given = f", with the kinds that build was given, kinds=({', '.join(strange)},)" if strange else ""
        raise ValueError(
            f'load: expected "{path}" to fit this {type(model).__name__}, found:\n{several(faults)}\n'
            f"Load it onto the model that it was made for{given}."
        )
    return adapt, params, header, tensors


def _layers(adapt: Adapt) -> dict[str, tuple[str, list[int]]]:
    """Return the kind and the weight's shape, as it is stored, of each linear layer that follows from them."""
    found = {}
    for target, cfg in adapt._plan.entries:
        layer = adapt._plan.layer(target, cfg)
        own: Any = getattr(layer, "own", lambda name: None)("weight") if cfg.adapts == "linear" else None
        if isinstance(own, Tensor) and follows(adapt._plan.base, target.kind.host(target.path)):
            found[target.path] = target.kind.__name__, list(own.shape)
    return found


def _plain(leaf: Tensor) -> Tensor:
    return leaf.detach().cpu().contiguous().clone()  # safetensors refuses views and shared storage


def _shapes(tree: Tree) -> dict[str, dict[str, tuple[int, ...]]]:
    return {path: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for path, leaves in tree.items()}


def _known(variants: Any) -> dict[str, type[AdapterConfig]]:
    classes = list(variants.values()) if isinstance(variants, Mapping) else variants
    if not isinstance(classes, Sequence) or not all(isinstance(c, type) and hasattr(c, "name") for c in classes):
        raise TypeError(
            f"load: expected variants as a sequence of config classes or a mapping by name, found {variants!r}. Write [ItsConfig]."
        )
    return {**VARIANTS, **(variants if isinstance(variants, Mapping) else {cls.name: cls for cls in classes})}


def _classes(configs: Sequence[AdapterConfig]) -> dict[str, str]:
    """Return the classes from outside the package whose variants have the names of shipped ones, by that name.

    Raises:
        ValueError: where two classes have one name, of which a file would be read as one of them.
    """
    named: dict[str, Any] = {}
    for cfg in configs:
        cls = getattr(type(cfg), "_written", type(cfg))
        other = named.setdefault(cfg.name, cls)
        if other is not cls:
            raise ValueError(
                f'save: expected a name of its own for each variant, found "{cfg.name}" for {other.__name__} and {cls.__name__}. Give one '
                "of the classes another name."
            )
    return {name: cls.__name__ for name, cls in named.items() if name in VARIANTS and cls is not VARIANTS[name]}


def _configs(header: Header, known: Mapping[str, type[AdapterConfig]], path: object) -> list[AdapterConfig]:
    stored = header.configs
    missing = [config["name"] for config in stored if config["name"] not in known]
    if missing:
        raise ValueError(
            f'load: expected "{path}" to hold one of the variants {listed(known, 40)}, found {listed(missing)}. Closest: '
            f"{nearest(missing[0], known, 1)}. Pass a variant from outside the package as load(..., variants=[ItsConfig])."
        )
    for name, cls in header.classes.items():
        if known[name] is VARIANTS.get(name):
            raise ValueError(
                f'load: expected the class {cls}, whose variant in "{path}" has the name "{name}" of {known[name].__name__}, found it not '
                f"given. Pass load(..., variants=[{cls}])."
            )
    try:
        return [from_json(known[config["name"]], config) for config in stored]
    except (TypeError, ValueError) as e:
        raise ValueError(f'load: expected "{path}" to hold configs that their variants take. {e}') from e


def _entries(
    model: nn.Module, targets: Mapping[str, Stored], configs: list[AdapterConfig], kinds: Sequence[type[Kind]]
) -> tuple[Entries, list[str]]:
    modules, shared = dict(model.named_modules()), sharing(model)
    found_by = {site: find(model, site, kinds) for site in {configs[stored.config].adapts for stored in targets.values()}}
    entries, faults = [], []
    for path, stored in targets.items():
        kind = found_by[configs[stored.config].adapts].get(path)
        if kind is None:
            found = type(modules[path]).__name__ if path in modules else f"nothing; closest: {nearest(path, modules)}"
            faults.append(f'"{path}": expected a {SITES[configs[stored.config].adapts][0]}, found {found}')
            continue
        W = kind.at(model, path)
        # Where single rows of a table are moved, their width alone has to be the same, as the params' shapes say.
        if (W.in_features, W.out_features) != (stored.i, stored.o) and "rows" not in configs[stored.config].uses:
            faults.append(f'"{path}": expected a layer of shape {(stored.o, stored.i)}, found {(W.out_features, W.in_features)}')
        target = Target(path, kind, W.in_features, W.out_features, stored.role, kind.holders(path, shared))
        entries.append((target, configs[stored.config]))
    return tuple(entries), faults


def _bind(
    base: nn.Module, header: Header, entries: Entries, tensors: Mapping[str, Tensor], remat: str | None, kinds: Sequence[type[Kind]]
) -> tuple[Adapt, Tree]:
    params: Tree = {}
    constants: Tree = {}
    for (path, stored), (target, _) in zip(header.targets.items(), entries):
        # Copied: a mapped file is not aligned, and sums over it would round otherwise than over what was saved.
        device = target.kind.at(base, path).device
        params[path] = {name: tensors[join(path, name)].to(device, copy=True) for name in stored.params}
        constants[path] = {name: tensors[CONSTANT + join(path, name)].to(device, copy=True) for name in stored.constants}
    common = {v: {name: tensors[CONSTANT + join(v, name)].to(device, copy=True) for name in names} for v, names in header.shared.items()}
    for variant, names in header.shared_params.items():
        params[variant] = {name: tensors[join(variant, name)].to(device, copy=True) for name in names}
    plan = Plan(base, entries, _shapes(params), constants, remat, common, groups_of(base, entries), kinds=kinds, starts=header.starts)
    return Adapt(plan), params
