"""Read the weights that a base had before it was quantised, for variants that start from the quantisation error."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from lora_lite.core.alike import made_alike
from lora_lite.core.errors import listed, require_type, several
from lora_lite.core.plan import Entries

Originals = Mapping[str, Tensor] | str | os.PathLike[str]


@made_alike
def read_originals(model: nn.Module, entries: Entries, original: Originals | None) -> dict[str, Tensor]:
    """Return the original weight of each target whose variant needs it, by path.

    Args:
        model: the model.
        entries: each target with its config.
        original: a state dict, or the path of a safetensors file or of a folder of them, read one tensor at a time.

    Raises:
        TypeError: where it is of another type.
        ValueError: where it is missing or not used, or lacks a weight or holds it in another shape; it lists each case.
        FileNotFoundError: where there is no such file.
    """
    wanting = [(target, cfg) for target, cfg in entries if cfg.original]
    names = sorted({type(cfg).__name__ for _, cfg in (wanting or entries)})
    if wanting and original is None:
        raise ValueError(
            f"build: expected the weights from before quantisation for {listed(names)}, found none. Use "
            "build(model, cfg, original=...), the state dict of the model that was quantised, or the path of its safetensors files."
        )
    if original is None:
        return {}
    if not wanting:
        raise ValueError(f"build: expected no original weights, since none of {listed(names)} uses them, found some. Leave original out.")
    require_type(
        isinstance(original, Mapping | str | os.PathLike),
        "build(model, cfg, original=state_dict)",
        "original",
        "a state dict, or the path of safetensors files",
        original,
    )
    found, faults = {}, []
    with _opened(original) as weights:
        for target, _ in wanting:
            name, weight = target.kind.at(model, target.path).original(weights, target.path)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != (target.o, target.i) or not weight.is_floating_point():
                other = "none" if weight is None else type(weight).__name__
                what = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else other
                faults.append(f'"{name}": expected a floating weight of shape {(target.o, target.i)}, found {what}')
            else:
                found[target.path] = weight
    if faults:
        raise ValueError(f"build: expected the original weights of the targets, found:\n{several(faults)}\nPass the unquantised model's.")
    return found


class _Files(Mapping[str, Tensor]):
    """The tensors of open safetensors files, read when asked for."""

    def __init__(self, files: list[Any]) -> None:
        self._places = {name: file for file in files for name in list(file.keys())}

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def _opened(original: Originals) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(original, Mapping):
        yield original
        return
    place = Path(original)
    paths = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(
            f'build: expected original="{place}" to be a safetensors file or a folder of them, found none. Check the path.'
        )
    with ExitStack() as files:
        yield _Files([files.enter_context(safetensors.safe_open(path, framework="pt")) for path in paths])
