"""An adapter from the disk, with its base model or without."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lora_lite.adapt import Adapt
from lora_lite.core.errors import listed, several
from lora_lite.core.frozen import Frozen
from lora_lite.core.plan import Target
from lora_lite.core.tree import Tree
from lora_lite.files.adapter_file import bound, settle
from lora_lite.files.checkpoint import Checkpoint
from lora_lite.files.kohya import from_kohya
from lora_lite.files.kohya.names import of_image_tools
from lora_lite.files.kohya.read import FILE as DIFFUSERS
from lora_lite.files.outline import Outline, model_of, outline, tables
from lora_lite.files.peft import from_peft
from lora_lite.files.peft.hub import CONFIG, around
from lora_lite.layers.kind import Variant


class Opened(NamedTuple):
    """Adapters over one model.

    Attributes:
        adapts: one for each file.
        trees: their params.
        based: whether the model has the weights of the base model, or zeros.
        outlines: without them, the layers as the files tell of them.
    """

    adapts: list[Adapt]
    trees: list[Tree]
    based: bool
    outlines: list[Outline]


def opened(places: Sequence[Path], base: Path | None, prefix: str | None = None) -> Opened:
    """Read adapters onto one base model, or onto their own outline.

    Args:
        places: files that `save` or an image tool wrote, or folders of PEFT's.
        base: the base model, or None.
        prefix: the part of a pipeline that is meant in files of image tools.

    Raises:
        FileNotFoundError: where something is not there.
        ValueError: where a file is damaged, or does not fit.
    """
    places = [require_place(place) for place in places]
    if base is not None:
        checkpoint = Checkpoint(base, functools.partial(tables, places))
        pairs = [on(checkpoint, place, prefix) for place in places]
        return Opened([adapt for adapt, _ in pairs], [tree for _, tree in pairs], True, [])
    outlines = [outline(place) for place in places]
    model = model_of(outlines)
    pairs = []
    for place, found in zip(places, outlines):
        try:
            pairs.append(_read(model, place, prefix=""))
        except ValueError as e:
            require_base(found.unsure)
            raise ValueError(f"{e} Without the base model its layers are taken for bare ones: pass it, --base MODEL.") from e
    return Opened([adapt for adapt, _ in pairs], [tree for _, tree in pairs], False, outlines)


def require_place(place: Path) -> Path:
    """Return the file or the folder of an adapter, which may be named by one of PEFT's files in it.

    Raises:
        FileNotFoundError: where there is none.
    """
    if not place.exists():
        raise FileNotFoundError(f'expected an adapter at "{place}", found nothing. Pass a file that ll.save wrote, or a folder of PEFT\'s.')
    if place.is_dir() and not (place / CONFIG).exists() and (place / DIFFUSERS).is_file():
        return place / DIFFUSERS
    return around(place) or place


def _read(model: nn.Module, place: Path, prefix: str | None, read: Callable[[], None] | None = None) -> tuple[Adapt, Tree]:
    """Read an adapter of any form. A file of `save` is held against the weights, where there are any to `read`."""
    if place.is_dir():
        return from_peft(model, place)
    if of_image_tools(place):
        return from_kohya(model, place, prefix=prefix)
    found = bound(model, place)
    if read is not None:
        settle(model, place, *found, read)
    return found[:2]


def on(checkpoint: Checkpoint, place: Path, prefix: str | None = None) -> tuple[Adapt, Tree]:
    """Read one adapter onto the modules of a checkpoint.

    Raises:
        ValueError: where it does not fit; it says which modules the files lack, if some do.
    """
    try:
        return _read(checkpoint.model, place, prefix, checkpoint.mapped.release)
    except ValueError as e:
        if not checkpoint.lacking:
            raise
        if checkpoint.known:
            found = "have no tensors of their own for", "transformers makes these of others"
        else:
            found = "do not tell by their shapes alone of what class the layer is at", "as of a transposed convolution"
        raise ValueError(
            f'{e}\nThe files of "{checkpoint.place}" {found[0]} {listed(checkpoint.lacking)}: {found[1]}. Load the model and call '
            "adapt.merge."
        ) from e


def require_known(found: Opened, also: bool = False) -> None:
    """Raise where what is to be done needs the base model and it was not given.

    Args:
        found: the adapters.
        also: whether it reads the updates themselves, which of some variants depend on the weights.
    """
    if found.based:
        return
    reasons: dict[str, list[str]] = {}
    for one in found.outlines:
        for reason, paths in one.unsure.items():
            reasons.setdefault(reason, []).extend(paths)
    for adapt, tree in zip(found.adapts, found.trees):
        for target, cfg in zip(adapt.targets, adapt.configs):
            if "dense" in cfg.uses and cfg.adapts == "linear":
                reasons.setdefault(f"{type(cfg).__name__} derives tensors from the weight", []).append(target.path)
            elif also and of_weight(adapt, tree, target):
                reasons.setdefault(f"the update of {type(cfg).__name__} depends on the weight", []).append(target.path)
    require_base(reasons)


def require_base(reasons: Mapping[str, list[str]]) -> None:
    """Raise where something needs the base model, which was not given.

    Args:
        reasons: the paths of the layers for which it does, by the reason.
    """
    if reasons:
        faults = [f"{reason} (at {listed(paths)})" for reason, paths in reasons.items()]
        raise ValueError(
            f"expected the base model, without which this cannot be done, found none:\n{several(faults, 3)}\nPass it: --base MODEL."
        )


@torch.no_grad()
def of_weight(adapt: Adapt, tree: Tree, target: Target) -> bool:
    """Whether a target's update is another where the weight is another, as of two random weights."""
    plan = adapt._plan
    cfg = next(cfg for own, cfg in plan.entries if own.path == target.path)
    if cfg.adapts != "linear":
        return False
    leaves = {name: t.double() for name, t in plan.leaves(tree, target.path, cfg).items()}
    constants = {name: c.double() if c.is_floating_point() else c for name, c in plan.constants_at(target.path, cfg).items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, target.i, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(2):
        W = Frozen(torch.randn(target.o, target.i, generator=generator, dtype=torch.float64), None, constants)
        found.append(Variant(cfg)(leaves, W, x) - W(x))
    return not torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-9)


def quietly(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return the texts of warnings, each once and on one line."""
    return list(dict.fromkeys(" ".join(str(w.message).split()) for w in caught if issubclass(w.category, UserWarning)))
