"""Count multiply-adds per token of a variant by running its pure function on shapes alone.

Matrix products count `m n k`, products of two tensors entry by entry count one an entry, as in the literature's tables. What is
paid once per forward, whatever the number of tokens, is left out by counting two sizes and taking the difference.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed
from lora_lite.core.frozen import Frozen
from lora_lite.layers.identity import on_meta
from lora_lite.layers.kind import Kind, Variant

aten = torch.ops.aten
_MATMULS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}
_PRODUCTS = (aten.mul, aten.div, aten.addcmul, aten.addcdiv)


Probe = Callable[[Any, int], tuple[Frozen, Tensor, int]]


class _Counter(TorchDispatchMode):
    """Add up the multiply-adds of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _MATMULS:
            left, right = args[_MATMULS[packet]], args[_MATMULS[packet] + 1]
            self.macs += left.numel() * right.shape[-1]
        elif packet in _PRODUCTS and all(isinstance(a, Tensor) for a in args[:2]):
            self.macs += out.numel()
        return out


def macs_per_token(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Frozen, probe: Probe = on_meta) -> int:
    """Count the multiply-adds that a variant adds to one linear map for one token, the map's own taken off.

    Args:
        cfg: the variant.
        params: the map's params; only their shapes are used.
        W: the map; only shapes are used.
        probe: `(W, tokens)` to the map and an input of so many tokens on meta, and the map's own multiply-adds for one.

    Raises:
        RuntimeError: where the variant's function does not run on shapes alone.
    """
    meta = {name: torch.empty(p.shape, device="meta") for name, p in params.items()}

    def count(tokens: int) -> int:
        layer, x, own = probe(W, tokens)
        try:
            with _Counter() as counter, torch.no_grad():
                Variant(cfg)(meta, layer, x)
        except Exception as e:
            raise RuntimeError(
                f"{type(cfg).__name__}.forward: expected a function that runs where multiply-adds are counted, on params, constants and x "
                f"{tuple(x.shape)} on meta, which have shapes and no values, found {type(e).__name__}: {str(e).rstrip('.!')}. Make tensors "
                "where x is, as by x.new_zeros(4) or torch.ones(4, device=x.device), for x of any leading axes, and read no values."
            ) from e
        return counter.macs - tokens * own

    return (count(5) - count(3)) // 2  # one token alone would turn products with a vector into other operations


def declared(cfg: AdapterConfig, fact: str, i: int, o: int, biased: bool = False) -> int | None:
    """Return the number that a config's formula `trained` or `macs` gives for a layer of widths `i` and `o`, or None without a formula."""
    formula = getattr(cfg, fact)
    if formula is None:
        return None
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    known = {**fields, **cfg.sizes(i, o), "i": i, "o": o, "biased": biased}
    try:
        count: int = eval(formula, {"__builtins__": {"min": min, "max": max, "len": len}}, known)  # the class's own text
    except (NameError, SyntaxError, TypeError) as e:
        raise ValueError(
            f"{type(cfg).__name__}.{fact}: expected a formula in {listed(known, 20)}, found {formula!r} ({e}). Correct the class variable."
        ) from e
    return count


def _probe(W: Kind, k: int, part: Any, tokens: int) -> tuple[Frozen, Tensor, int]:
    return W.probe(tokens)[k][1:]


def macs_of(cfg: AdapterConfig, params: Mapping[str, Tensor], W: Kind) -> int:
    """Count the multiply-adds that a variant adds to a layer for one token, over all its linear maps."""
    total = 0
    for k, (name, part, _, _) in enumerate(W.probe(3)):
        total += macs_per_token(cfg, W.part(params, name), part, functools.partial(_probe, W, k))
    return total
