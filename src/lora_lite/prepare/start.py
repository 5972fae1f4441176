"""Draw a target's params at their start, from a generator of its own."""

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen, Params


def start(cfg: AdapterConfig, W: Frozen, generator: torch.Generator) -> Params:
    """Run a variant's `init` on a layer whose constants are filled; of several linear maps on each, stacked.

    Raises:
        TypeError: where `init` returns anything but tensors by name.
    """
    each: list[Any] = [cfg.init(part, generator) for part in W.parts]
    if not all(isinstance(params, Mapping) for params in each):
        found = "two trees" if isinstance(each[0], tuple) else type(each[0]).__name__
        raise TypeError(
            f"{type(cfg).__name__}.init: expected a mapping from names to the tensors to train, found {found}. Return frozen tensors from "
            "constants(W, generator, stats); init finds them in W.constants."
        )
    return joined(each) if W.stacked else each[0]


def start_params(cfg: AdapterConfig, W: Frozen, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the params at a layer's start, in the config's dtype and on the layer's device."""
    # Dense in memory, as params read from a file are: products of another layout may round otherwise.
    params = start(cfg, W, generator)
    return {name: p.to(W.device, cfg.dtype, copy=True, memory_format=torch.contiguous_format) for name, p in params.items()}


def joined(trees: Sequence[Params]) -> dict[str, Tensor]:
    """Stack the tensors of one name of each tree along a first axis."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def generator_for(seed: int, path: str) -> torch.Generator:
    """Return a target's own generator: the seed folded with its path.

    Raises:
        TypeError: where `seed` is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"adapt.init: expected seed as an integer, found {seed!r}. Use e.g. adapt.init(seed=0).")
    digest = hashlib.blake2b(f"{int(seed)}:{path}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
