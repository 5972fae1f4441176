"""One finder for all kinds: what a variant of a site can adapt in a model, by path."""

import re
from collections.abc import Sequence

from torch import nn

from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import KINDS, kind_of

Found = dict[str, type[Kind]]


def find(model: nn.Module, site: str, kinds: Sequence[type[Kind]] = ()) -> Found:
    """Find the kind of everything that a variant of `site` can adapt, by path, in the model's order.

    Args:
        model: any module; it is only read.
        site: a key of `SITES`.
        kinds: kinds besides those that ship, asked first.
    """
    asked = [kind for kind in (*kinds, *KINDS) if kind.site == site]
    found: Found = {}
    for path, module in model.named_modules():
        for kind in asked:
            for place in kind.places(path, module, lambda m: kind_of(m, kinds)):
                if place == path or path not in found:  # the parameters of a layer are its own affair
                    found.setdefault(place, kind)
    return _outermost_blocks(found) if site == "block" else found


def _outermost_blocks(found: Found) -> Found:
    return {path: kind for path, kind in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def asked_for(found: Found, patterns: Sequence[str]) -> Found:
    """Leave out what only a name can ask for and no pattern names.

    `.*` or `layers\\.0` match a whole region, in which the layers that need no naming are meant.
    """
    plain = unnamed(found)
    return {path: kind for path, kind in found.items() if not kind.by_name or any(names(p, path, plain) for p in patterns)}


def unnamed(found: Found) -> list[str]:
    """Return the paths of what a config takes without naming it."""
    return [path for path, kind in found.items() if not kind.by_name]


def names(pattern: str, path: str, plain: Sequence[str]) -> bool:
    """Whether a pattern asks for what stands at `path` itself rather than for a region that contains it."""
    if not re.search(pattern, path):
        return False
    region = path[: len(path) - len(path.rpartition(".")[2])] + "\0"
    return not re.search(pattern, region) or not any(re.search(pattern, other) for other in plain)


def adopt(module: nn.Module, kinds: Sequence[type[Kind]] = ()) -> None:
    """Prepare a module of a private copy where its own forward would not do, target or not."""
    kind = kind_of(module, kinds)
    if kind is not None:
        kind.adopt(module)


def faults(model: nn.Module, kinds: Sequence[type[Kind]] = ()) -> list[str]:
    """List the layers of a model that their kinds cannot read as they are, each with the way out."""
    found = [(path, module, kind_of(module, kinds)) for path, module in model.named_modules()]
    return [
        f'"{path}" ({type(module).__name__}) {fault}' for path, module, kind in found if kind is not None and (fault := kind.fault(module))
    ]


def packed(module: nn.Module, path: str, kinds: Sequence[type[Kind]] = ()) -> list[str]:
    """Name the layers inside a module whose weight no gradient reaches, since it is stored packed."""
    from lora_lite.layers.quantised import FrozenQuantised

    found = [(inner, kind_of(m, kinds)) for inner, m in module.named_modules(prefix=path)]
    return [inner for inner, kind in found if kind is not None and issubclass(kind, FrozenQuantised)]
