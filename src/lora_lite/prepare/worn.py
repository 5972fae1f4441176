"""Refuse to adapt a model by half: layers named beside others of classes that cannot be adapted, and models that wear adapters already."""

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from lora_lite.clone.adapter import adapters
from lora_lite.clone.structure import refuse_uncopied
from lora_lite.core.config import AdapterConfig, patterns_of
from lora_lite.core.errors import exactly, listed
from lora_lite.core.tree import modules_by_path
from lora_lite.layers.find import names


def refuse_bound(model: nn.Module) -> None:
    """Refuse a module of ours that already runs adapters.

    Raises:
        ValueError: with the way out.
    """
    worn = next(iter(adapters(model)), None)
    if worn is not None:
        raise ValueError(
            f'find_targets: expected a model without adapters, found one that adapt.module(params) made, adapted at "{worn.path}". Build '
            "on the model itself: with both configs, build(model, [first, second]); or with the first adapter in its weights, "
            "model.load_state_dict(adapt.merge(params), strict=False)."
        )


def refuse_unadaptable(model: nn.Module) -> None:
    """Refuse a model that no config can adapt, before a file is read: a module of ours, and one of which no copy runs.

    Raises:
        ValueError: with the way out.
    """
    refuse_bound(model)
    refuse_uncopied(model)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that another library, such as PEFT, has put around layers to adapt them, by path."""
    return {path: m for path, m in modules_by_path(model).items() if _wraps(m)}


def _wraps(module: nn.Module) -> bool:
    children = module._modules
    return "base_layer" in children or {"original_module", "modules_to_save"} <= set(children)


def refuse_worn(model: nn.Module, targets: Iterable[tuple[str, AdapterConfig]], around: Callable[[str], bool] = lambda path: False) -> None:
    """Refuse targets inside the adapters of another library, of which only parts would be adapted.

    A module of the model's own may look like one. So a target that its config names by the whole path is taken.

    Args:
        model: the model.
        targets: paths of the targets, with their configs.
        around: whether a path is asked for, for the adapters themselves.

    Raises:
        ValueError: it names the adapted layers, with the way out.
    """
    worn, paths = wrappers(model), [path for path, cfg in targets if exactly(path) not in patterns_of(cfg.target_names)]
    touched = [path for path in worn if around(path) or any(p.startswith(f"{path}.") for p in paths)]
    if touched:
        inner = next((p for p in paths if p.startswith(f"{touched[0]}.")), f"{touched[0]}.base_layer")
        cls = type(worn[touched[0]])
        kinds = f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"
        raise ValueError(
            f"find_targets: expected layers without adapters of another library, found {listed(touched)} ({kinds}). Take that adapter into "
            "the weights or off first, with PEFT: model = model.merge_and_unload() or model.unload(). Or leave these layers out: "
            f"exclude_names=({_escaped(touched[0])}, ...). Where they are the model's own, name each layer by its whole path: "
            f'target_names=(r"{exactly(inner)}", ...).'
        )


def _escaped(path: str) -> str:
    last = path.rpartition(".")[2]
    return rf'r"^{re.escape(path)}(\.|$)"' if last.isdigit() else f'r"{re.escape(last)}"'


def refuse_half(model: nn.Module, cfg: AdapterConfig, found: Sequence[str], chosen: Sequence[str], wanted: Callable[[str], bool]) -> None:
    """Refuse an expression that also names layers of classes that cannot be adapted.

    What contains a chosen layer or lies in one is fine, and so is what holds no matrix: norms, activations, dropouts.

    Args:
        model: the model.
        cfg: the config.
        found: paths of everything that can be adapted.
        chosen: paths of the layers that the config takes.
        wanted: whether a path is of the config's blocks and not excluded.

    Raises:
        ValueError: it names the layers, with the way out.
    """
    known, inside = set(found), {path[:k] for path in chosen for k, letter in enumerate(path) if letter == "."}
    taken = tuple(f"{path}." for path in chosen)
    for pattern in cfg.target_names:
        others: list[tuple[str, nn.Module]] = []
        for path, module in modules_by_path(model).items():
            if not path or path in known or path in inside or path.startswith((*taken, *(f"{p}." for p, _ in others))):
                continue
            if re.search(pattern, path) and wanted(path) and names(pattern, path, found) and _holds_matrix(module):
                others.append((path, module))
        if others:
            path, module = others[0]
            inner = next((p for p in found if p.startswith(f"{path}.")), None)
            way = f'Name the layer inside too, e.g. r"{ending(inner)}"' if inner else "Give their kind, kinds=(ItsKind,)"
            raise ValueError(
                f'{type(cfg).__name__}.target_names: expected "{pattern}" to name layers that can be adapted, found '
                f"{listed(f'{p} ({type(m).__name__})' for p, m in others)} among them. {way}; or leave them out: "
                f'exclude_names=(r"{_region(path, chosen)}",).'
            )


def ending(path: str) -> str:
    """Return an expression of the last two parts of a path."""
    return re.escape(".".join(path.split(".")[-2:])) + "$"


def _region(path: str, chosen: Sequence[str]) -> str:
    """Return an expression of the region around a path, as large as holds no chosen layer."""
    parts = path.split(".")
    for k in range(1, len(parts)):
        region = ".".join(parts[:k]) + "."
        if not any(other.startswith(region) for other in chosen):
            return "^" + re.escape(region)
    return exactly(path)


def _holds_matrix(module: nn.Module) -> bool:
    if "linear" in type(module).__name__.lower() or any(p.dim() > 1 for p in module.parameters()):
        return True
    return any(b.dim() > 1 and b.dtype.itemsize <= 4 and not b.is_floating_point() and b.dtype.is_signed for b in module.buffers())
