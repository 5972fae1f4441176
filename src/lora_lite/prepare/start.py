"""Where training starts: each target's params, from its config and a generator of its own."""

import hashlib
from numbers import Integral

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig


def start_params(cfg: AdapterConfig, W: object, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a target's params, in the config's dtype and on the layer's device; `W` is its kind, with the constants."""
    params = W.make(lambda part: init_of(cfg, part, generator))  # type: ignore[attr-defined]
    return {name: placed(p, W.device, cfg.dtype) for name, p in params.items()}  # type: ignore[attr-defined]


def placed(p: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a start to where it is trained: dense in memory, as params read from a file are; products of another layout may round otherwise."""
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


# TEMPORARY until the configs have two methods
def init_of(cfg, W, g):
    r = cfg.init(W, g)
    return r[0] if isinstance(r, tuple) else r
