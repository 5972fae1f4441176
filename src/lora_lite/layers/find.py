"""The finder for all kinds: the targets that a variant of a site can adapt in a model, by path."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lora_lite.core.tree import modules_by_path
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import candidates, kind_of

T = TypeVar("T")
Found = dict[str, type[Kind]]


def find(model: nn.Module, site: str, kinds: Sequence[type[Kind]] = ()) -> Found:
    """Find the targets that a variant of `site` can adapt: the kind of each by path, in the model's order.

    Args:
        model: any module; it is only read.
        site: a key of `SITES`.
        kinds: kinds besides those that ship, asked first.
    """
    found: Found = {}
    for path, module in modules_by_path(model).items():
        for kind in (*kinds, *candidates(module)):
            for place in kind.places(path, module, lambda m: kind_of(m, kinds)) if kind.site == site else ():
                if place == path or _owner(path, module) not in found:  # a layer that is a target itself keeps its parameters
                    found.setdefault(place, kind)
    return _outermost_blocks(found) if site == "block" else found


def _owner(path: str, module: nn.Module) -> str:
    """Return the path of the module whose parameters a module holds: those of a parametrization are the layer's around it."""
    return ".".join(path.split(".")[:-2]) if isinstance(module, ParametrizationList) else path


def _outermost_blocks(found: Found) -> Found:
    return {path: kind for path, kind in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def asked_for(found: Found, patterns: Sequence[str]) -> Found:
    """Leave out targets that only a name can ask for, where no pattern names them.

    `.*` or `layers\\.0` match a whole region, in which the layers that need no naming are meant.
    """
    plain = unnamed(found)
    return {path: kind for path, kind in found.items() if not kind.by_name or any(names(p, path, plain) for p in patterns)}


def unnamed(found: Found) -> list[str]:
    """Return the paths of the layers that a config takes without naming them."""
    return [path for path, kind in found.items() if not kind.by_name]


def names(pattern: str, path: str, plain: Sequence[str]) -> bool:
    """Whether a pattern asks for the layer at `path` itself rather than for a region that contains it."""
    if not re.search(pattern, path):
        return False
    region = path[: len(path) - len(path.rpartition(".")[2])] + "\0"
    return not re.search(pattern, region) or not any(re.search(pattern, other) for other in plain)


def adopt(modules: Iterable[nn.Module], kinds: Sequence[type[Kind]] = ()) -> None:
    """Let the kinds of layers in a private copy replace the layers' forward, where their own would not do."""
    for module, kind in _of_kinds_with("adopt", ((module, module) for module in modules), kinds):
        kind.adopt(module)


def distribute(modules: Iterable[nn.Module], device: torch.device, kinds: Sequence[type[Kind]] = ()) -> None:
    """Let the kinds of layers in a private copy prepare them for their parameters to be split over processes."""
    for module, kind in _of_kinds_with("distribute", ((module, module) for module in modules), kinds):
        kind.distribute(module, device)


def faults(model: nn.Module, kinds: Sequence[type[Kind]] = ()) -> list[str]:
    """List the layers of a model that their kinds cannot read as they are, each with the way out."""
    named = ((module, (path, module)) for path, module in modules_by_path(model).items())
    return [
        f'"{path}" ({type(module).__name__}) {fault}'
        for (path, module), kind in _of_kinds_with("fault", named, kinds)
        if (fault := kind.fault(module))
    ]


def _of_kinds_with(method: str, modules: Iterable[tuple[nn.Module, T]], kinds: Sequence[type[Kind]]) -> Iterator[tuple[T, type[Kind]]]:
    """Yield the value beside each module whose kind has a `method` of its own, and the kind. Few have, and asking all takes time."""
    for module, value in modules:
        having = _having(method, (*kinds, *candidates(module)))
        if having and any(kind.fits(module) for kind in having) and (kind := kind_of(module, kinds)) is not None:
            yield value, kind


@functools.lru_cache(1024)
def _having(method: str, kinds: tuple[type[Kind], ...]) -> list[type[Kind]]:
    return [kind for kind in kinds if getattr(kind, method).__func__ is not getattr(Kind, method).__func__]


def packed(module: nn.Module, path: str, kinds: Sequence[type[Kind]] = ()) -> list[str]:
    """List the paths of the layers inside a module whose weight is packed, so that no gradient reaches it."""
    from lora_lite.layers.quantised import FrozenQuantised

    found = [(inner, kind_of(m, kinds)) for inner, m in module.named_modules(prefix=path)]
    return [inner for inner, kind in found if kind is not None and issubclass(kind, FrozenQuantised)]
