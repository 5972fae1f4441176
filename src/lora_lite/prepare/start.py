"""The start of training: each target's params, from its config and a generator of its own."""

import hashlib
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.frozen import Frozen, Params
from lora_lite.layers.kind import Kind


def start_params(cfg: AdapterConfig, W: Kind, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a target's params in the config's dtype, on the layer's device. `W` is the layer, with its constants."""
    params = W.make(lambda part: own_start(cfg, part, generator))
    return {name: placed(p, W.device, cfg.dtype) for name, p in params.items()}


def placed(p: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a start to where it is trained: dense in memory, as a file's params are, since another layout may round otherwise."""
    return p.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def generator_for(seed: int, path: str) -> torch.Generator:
    """Return a target's own generator: the seed folded with its path.

    Raises:
        TypeError: where `seed` is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"adapt.init: expected seed as an integer, found {seed!r}. Use e.g. adapt.init(seed=0).")
    digest = hashlib.blake2b(f"{int(seed)}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@made_alike
def own_start(cfg: AdapterConfig, W: Frozen, generator: torch.Generator) -> Params:
    """Run a variant's `init` on one linear map whose constants are filled.

    Raises:
        TypeError: where `init` returns anything but floating tensors by name.
    """
    params: Any = cfg.init(W, generator)
    require_tensors(params, f"{type(cfg).__name__}.init", trained=True)
    return dict(params)


def require_tensors(found: Any, method: str, trained: bool = False) -> None:
    """Raise unless a variant's method returned tensors by name, floating ones where they are trained.

    Raises:
        TypeError: it names the method and the first tensor that is none.
    """
    if not isinstance(found, Mapping):
        kind = "two trees" if isinstance(found, tuple) else "nothing" if found is None else type(found).__name__
        tensors, way = ("the tensors to train", _WAY) if trained else ("tensors", "Return a dict, empty for no tensors.")
        raise TypeError(f"{method}: expected a mapping from names to {tensors}, found {kind}. {way}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{method}: expected names that are strings and not empty, found {name!r}. They name tensors in files.")
        if not isinstance(tensor, Tensor):
            nested = isinstance(tensor, Mapping) and tensor
            way = f'Put its tensors beside it, as "{name}.{next(iter(tensor))}"' if nested else "Keep other values in fields"
            raise TypeError(f'{method}: expected "{name}" to be a tensor, found {type(tensor).__name__}. {way}.')
        if trained and not tensor.is_floating_point():
            wanted = f'expected "{name}" to be a floating tensor, which can be trained, found {tensor.dtype}'
            raise TypeError(f"{method}: {wanted}. Convert it, or return it from constants.")


def require_paths(found: Any, paths: Collection[str], method: str) -> None:
    """Raise unless a variant's method returned a mapping by the paths of its targets, of some of them at least.

    Raises:
        TypeError: where it returned anything else.
        ValueError: where a path is that of no target.
    """
    if not isinstance(found, Mapping):
        kind = "nothing" if found is None else type(found).__name__
        raise TypeError(f"{method}: expected a mapping by the paths of targets, found {kind}. Return a dict, empty for none of them.")
    if unknown := [path for path in found if path not in paths]:
        raise ValueError(
            f"{method}: expected paths of the config's targets, e.g. {listed(paths, 3)}, found {listed(unknown)}. Take the keys of what it "
            "was given."
        )


_WAY = "Return frozen tensors from constants(W, generator, stats); init finds them in W.constants."
