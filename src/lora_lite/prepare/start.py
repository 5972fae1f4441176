"""The start of training: each target's params, from its config and a generator of its own."""

import hashlib
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
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
        TypeError: where `init` returns anything but tensors by name.
    """
    params: Any = cfg.init(W, generator)
    if not isinstance(params, Mapping):
        found = "two trees" if isinstance(params, tuple) else type(params).__name__
        raise TypeError(
            f"{type(cfg).__name__}.init: expected a mapping from names to the tensors to train, found {found}. Return frozen tensors from "
            "constants(W, generator, stats); init finds them in W.constants."
        )
    return params
