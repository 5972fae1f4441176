"""Checks on quantised bases: a variant gives the same on packed weights as on the same weights dequantised."""

import copy
import importlib.util
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.adapt import Adapt
from lora_lite.core.config import AdapterConfig
from lora_lite.testing._case import VALUES, close, fail, float32
from lora_lite.testing._model import _build, _model

Quantise = Callable[[nn.Linear], tuple[nn.Module, Tensor]]


def quantised_4bit(cfg: AdapterConfig) -> None:
    """On 4-bit layers (nf4 in blocks, scales quantised too) values and gradients are those on the dequantised weight."""
    _same_as_dense(cfg, _to_4bit)


def quantised_8bit(cfg: AdapterConfig) -> None:
    """On 8-bit layers values and gradients are those on the dequantised weight."""
    _same_as_dense(cfg, _to_8bit)


def _bitsandbytes() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise unittest.SkipTest("bitsandbytes is not installed: pip install bitsandbytes")
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


def _models(cfg: AdapterConfig) -> list[tuple[nn.Module, Tensor]]:
    """Return models with linear layers, and inputs: of one layer each where the variant adapts linear layers."""
    if cfg.adapts == "module":
        raise unittest.SkipTest("it trains whole modules, and a quantised weight cannot be trained")
    if cfg.adapts != "linear":
        return [_model(cfg)]
    # Behind another layer the input would differ in the last digit, which the SVDs of some starts magnify.
    models: list[tuple[nn.Module, Tensor]] = []
    for case in float32(cfg):
        layer = nn.Linear(case.W.in_features, case.W.out_features, bias=case.W.bias is not None)
        layer.load_state_dict({"weight": case.W.dense()} if case.W.bias is None else {"weight": case.W.dense(), "bias": case.W.bias})
        models.append((nn.Sequential(layer).eval(), case.x))
    return models


def _twins(model: nn.Module, quantise: Quantise) -> tuple[nn.Module, nn.Module]:
    """Return copies of a model: its linear layers quantised, and with the dequantised weights."""
    packed, dense = copy.deepcopy(model), copy.deepcopy(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            replaced, weight = quantise(layer)
            packed.set_submodule(path, replaced)
            dense.get_submodule(path).weight.data = weight
    return packed.eval(), dense


def _same_as_dense(cfg: AdapterConfig, quantise: Quantise) -> None:
    for model, x in _models(cfg):
        (adapt, _), (twin, params) = (_build(m, cfg, x.shape[-1], model) for m in _twins(model, quantise))
        if cfg.identity == 0.0 and not torch.equal(adapt(adapt.init(), x), adapt.base(x)):
            fail("the quantised base's output exactly at init", "another")
        for what, f in _results(params, x).items():
            for got, want in zip(*(pytree.tree_leaves(f(a)) for a in (adapt, twin))):
                close(what, got, want, VALUES[torch.float32])


def _results(params: Any, x: Tensor) -> dict[str, Callable[[Adapt], Any]]:
    def loss(adapt: Adapt) -> Callable[[Any, Tensor], Tensor]:
        return lambda p, rows: (adapt(p, rows) - adapt.base(rows)).square().sum()

    return {
        "the update of a quantised layer": lambda adapt: adapt(params, x) - adapt.base(x),
        "the output of a quantised layer": lambda adapt: adapt(params, x),
        "a gradient on a quantised layer": lambda adapt: torch.func.grad(loss(adapt))(params, x),
        "the gradient to a quantised layer's input": lambda adapt: torch.func.grad(lambda t: adapt(params, t).square().sum())(x),
        "per-example gradients on a quantised layer": lambda adapt: torch.vmap(torch.func.grad(loss(adapt)), (None, 0))(params, x[:, None]),
    }
