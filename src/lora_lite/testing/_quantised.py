"""Checks on quantised bases: a variant computes on packed weights what it computes on the same weights, dequantised."""

import importlib.util
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite._tree import tree_leaves
from lora_lite.adapt import Adapt
from lora_lite.build import build
from lora_lite.config import AdapterConfig
from lora_lite.frozen import Frozen
from lora_lite.testing._case import VALUES, close, fail, float32, inputs

Quantise = Callable[[nn.Linear], tuple[nn.Module, Tensor]]


def quantised_4bit(cfg: AdapterConfig) -> None:
    """On 4-bit layers (nf4 in blocks, scales quantised too) values and gradients are those on the dequantised weight."""
    _same_as_dense(cfg, _to_4bit)


def quantised_8bit(cfg: AdapterConfig) -> None:
    """On 8-bit layers values and gradients are those on the dequantised weight."""
    _same_as_dense(cfg, _to_8bit)


def _bitsandbytes() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise unittest.SkipTest("bitsandbytes is not installed: pip install lora-lite[bitsandbytes]")
    import bitsandbytes

    return bitsandbytes


def _to_4bit(layer: nn.Linear) -> tuple[nn.Module, Tensor]:
    bnb = _bitsandbytes()
    sizes = (layer.in_features, layer.out_features)
    packed = bnb.nn.Linear4bit(*sizes, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(layer.state_dict())
    packed = packed.to("cpu")
    return packed, bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)


def _to_8bit(layer: nn.Linear) -> tuple[nn.Module, Tensor]:
    bnb = _bitsandbytes()
    packed = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    packed = packed.to("cpu")
    return packed, packed.weight.CB * packed.weight.SCB[:, None] / 127


def _linear(W: Frozen) -> nn.Linear:
    layer = nn.Linear(W.in_features, W.out_features, bias=W.bias is not None)
    layer.weight.data = W.dense().clone()
    if W.bias is not None:
        layer.bias.data = W.bias.clone()
    return layer


def _same_as_dense(cfg: AdapterConfig, quantise: Quantise) -> None:
    for case in float32(cfg):
        packed, weight = quantise(_linear(case.W))
        dense = _linear(case.W)
        dense.weight.data = weight
        calibration = [inputs(case.W.in_features)] if cfg.calibrated else None
        adapts = [build(nn.Sequential(layer).eval(), case.cfg, calibration=calibration) for layer in (packed, dense)]
        params = {"0": case.params}
        if cfg.identity == 0.0 and not torch.equal(adapts[0](adapts[0].init(), case.x), adapts[0].base(case.x)):
            fail("the quantised base's output exactly at init", "another")
        # One layer a model: behind another its input would differ in the last digit, which the SVDs of some starts magnify.
        for what, f in _results(params, case.x).items():
            for got, want in zip(*(tree_leaves({what: _named(f(adapt))}) for adapt in adapts)):
                close(what, got, want, VALUES[torch.float32])


def _results(params: Any, x: Tensor) -> dict[str, Callable[[Adapt], Any]]:
    def loss(adapt: Adapt) -> Callable[[Any, Tensor], Tensor]:
        return lambda p, rows: (adapt(p, rows) - adapt.base(rows)).square().sum()

    return {
        "the update of a quantised layer": lambda adapt: adapt(params, x) - adapt.base(x),
        "a gradient on a quantised layer": lambda adapt: torch.func.grad(loss(adapt))(params, x)["0"],
        "the output of a quantised layer": lambda adapt: adapt(params, x),
        "the gradient to a quantised layer's input": lambda adapt: torch.func.grad(lambda t: adapt(params, t).square().sum())(x),
        "per-example gradients on a quantised layer": lambda adapt: torch.vmap(torch.func.grad(loss(adapt)), (None, 0))(params, x)["0"],
    }


def _named(result: Any) -> dict[str, Tensor]:
    return {"": result} if isinstance(result, Tensor) else result
