"""The methods of these files, one row a variant: the tensors of a layer to a config and params, and back.

The scale is `alpha / r`. A file without an `alpha` means a scale of 1. LyCORIS' LoKr has a scale of 1 too where no matrix is factored.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.variants.loha import LoHaConfig
from lora_lite.variants.lokr import LoKrConfig, divided
from lora_lite.variants.lora import LoRAConfig

Tensors = Mapping[str, Tensor]
Kernel = tuple[int, ...]
"""The shape of a convolution's kernel, `(channels, *size)`; of a linear layer its input width alone."""

ALPHA, DOWN, MID, UP = "alpha", "lora_down.weight", "lora_mid.weight", "lora_up.weight"


class Read(NamedTuple):
    """The values of a config, and the params of a layer."""

    values: dict[str, Any]
    params: dict[str, Tensor]


class Method(NamedTuple):
    """A method of these files.

    Attributes:
        config: the variant's config class.
        keys: the ends of its keys, less `alpha`.
        read: `(tensors, alpha or None, (o, i))` to config values and params. A ValueError says what is not as it should be.
        write: `(config, params, kernel)` to tensors with `alpha`. A ValueError says what the file cannot hold.
    """

    config: type[AdapterConfig]
    keys: tuple[str, ...]
    read: Callable[[Tensors, float | None, tuple[int, int]], Read]
    write: Callable[[Any, Tensors, Kernel], dict[str, Tensor]]


def _read_lora(tensors: Tensors, alpha: float | None, shape: tuple[int, int]) -> Read:
    _require(tensors, DOWN, UP)
    A, B = tensors[DOWN], tensors[UP].flatten(1)
    if MID in tensors:  # LoCon's core between both, (r, r, *size) with a down of size 1: one factor of the same rank
        exact = torch.tensordot(tensors[MID].double(), A.flatten(1).double(), dims=([1], [0])).movedim(-1, 1)
        A = exact.to(torch.promote_types(A.dtype, torch.float32))  # params of a file in half precision are float32
    r = len(A)
    return Read({"r": r, "alpha": float(r) if alpha is None else alpha}, {"A": A.flatten(1), "B": B})


def _write_lora(cfg: LoRAConfig, params: Tensors, kernel: Kernel) -> dict[str, Tensor]:
    if set(params) != {"A", "B"}:
        raise ValueError("a trained bias: these files have none")
    A, B = params["A"], params["B"]
    ones = [1] * (len(kernel) - 1)
    alpha = cfg.alpha * math.sqrt(cfg.r) if cfg.rslora else cfg.alpha
    return {DOWN: A.reshape(len(A), *kernel), UP: B.reshape(*B.shape, *ones), ALPHA: _number(alpha)}


_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _read_loha(tensors: Tensors, alpha: float | None, shape: tuple[int, int]) -> Read:
    _require(tensors, *_HADA)
    r = len(tensors["hada_w1_b"])
    return Read({"r": r, "alpha": float(r) if alpha is None else alpha}, {name.removeprefix("hada_"): tensors[name] for name in _HADA})


def _write_loha(cfg: LoHaConfig, params: Tensors, kernel: Kernel) -> dict[str, Tensor]:
    return {**{f"hada_{name}": t for name, t in params.items()}, ALPHA: _number(cfg.alpha)}


_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def _read_lokr(tensors: Tensors, alpha: float | None, shape: tuple[int, int]) -> Read:
    found = {name.removeprefix("lokr_"): t.flatten(1) for name, t in tensors.items()}
    for name in ("w1", "w2"):
        if name not in found:
            _require(tensors, f"lokr_{name}_a", f"lokr_{name}_b")
    rank = next((len(found[name]) for name in ("w1_b", "w2_b") if name in found), None)
    rows, cols = (_sizes(found, "w1")), (_sizes(found, "w2"))
    if (rows[0] * cols[0], rows[1] * cols[1]) != shape:
        raise ValueError(f"matrices of shapes {rows} and {cols}, whose product is not {shape}")
    # A rank that factors nothing, where nothing is factored.
    r = rank or max(*rows, *cols)
    alpha = float(r) if rank is None or alpha is None else alpha
    factor = next((f for f in (-1, *range(1, max(rows) + 1)) if all(divided(n, f)[0] == m for n, m in zip(shape, rows))), None)
    if factor is None:
        raise ValueError(f"widths {shape} divided into {rows} and {cols}, which no decompose_factor gives")
    values = {"r": r, "alpha": alpha, "decompose_both": "w1_a" in found, "decompose_factor": factor}
    wanted = {name for own in LoKrConfig(**values)._shapes(shape[1], shape[0]).values() for name in own}
    if wanted != set(found):
        raise ValueError(f"matrices {', '.join(found)}, where rank {r} has {', '.join(sorted(wanted))}")
    return Read(values, found)


def _sizes(found: Tensors, name: str) -> tuple[int, int]:
    """Return the shape of a matrix that may be kept as two factors."""
    return (len(found[name]), found[name].shape[1]) if name in found else (len(found[f"{name}_a"]), found[f"{name}_b"].shape[1])


def _write_lokr(cfg: LoKrConfig, params: Tensors, kernel: Kernel) -> dict[str, Tensor]:
    tensors = dict(params)
    if not any(name.endswith("_b") for name in tensors):  # such a file has no rank to divide by
        tensors["w1"] = tensors["w1"] * (cfg.alpha / cfg.r)
    size = math.prod(kernel[1:])
    if size > 1 and (_sizes(params, "w2")[1] % size):
        raise ValueError(f"a second matrix {_sizes(params, 'w2')} that does not hold whole kernels of {kernel[1:]}")
    if size > 1 and "w2" in tensors:
        tensors["w2"] = tensors["w2"].reshape(len(tensors["w2"]), -1, *kernel[1:])
    return {**{f"lokr_{name}": t for name, t in tensors.items()}, ALPHA: _number(cfg.alpha)}


def _number(value: float) -> Tensor:
    exact = torch.tensor(float(value), dtype=torch.float32)
    return exact if float(exact) == float(value) else torch.tensor(float(value), dtype=torch.float64)


def _require(tensors: Tensors, *names: str) -> None:
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise ValueError(f"no {', '.join(lacking)} beside {', '.join(tensors) or 'alpha'}")


METHODS = {
    "lora": Method(LoRAConfig, (DOWN, UP, MID), _read_lora, _write_lora),
    "loha": Method(LoHaConfig, _HADA, _read_loha, _write_loha),
    "lokr": Method(LoKrConfig, _LOKR, _read_lokr, _write_lokr),
}
"""Each method by the name of its variant."""
