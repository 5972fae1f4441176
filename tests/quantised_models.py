"""Quantised models for tests: a model's linear layers packed by bitsandbytes, and its twin with the dequantised weights."""

import copy

import bitsandbytes as bnb
import torch
from torch import nn

BACKENDS = ("nf4", "nf4-nested", "fp4", "8-bit")


def quantised_layer(layer: nn.Linear, backend: str, compute_dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """Quantise one layer: in 4 bits with or without quantised scales, or in 8 bits."""
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if backend == "8-bit":
        packed = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)
    else:
        how = {"quant_type": backend[:3], "compress_statistics": backend.endswith("nested")}
        packed = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=compute_dtype, **how)
    packed.load_state_dict(layer.state_dict())
    return packed.to(layer.weight.device)  # which quantises it


def dequantised(layer: nn.Module) -> torch.Tensor:
    """Return a quantised layer's weight by bitsandbytes' own functions."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.CB * layer.weight.SCB[:, None] / 127


def twins(model: nn.Module, backend: str) -> tuple[nn.Module, nn.Module]:
    """Return copies of a model: with every linear layer but the head quantised, and with the same weights dequantised."""
    packed, dense = copy.deepcopy(model), copy.deepcopy(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not path.endswith("lm_head"):
            packed.set_submodule(path, quantised_layer(layer, backend))
            dense.get_submodule(path).weight.data = dequantised(packed.get_submodule(path))
    return packed.train(model.training), dense


def facts(model: nn.Module) -> dict[str, object]:
    """Return the facts of a user's quantised model that must not change: bytes, classes, and where its scales stand."""
    found: dict[str, object] = {}
    for path, m in model.named_modules():
        found[path] = type(m)
        if isinstance(m, bnb.nn.Linear4bit):
            s = m.weight.quant_state
            parts = (m.weight.data, s.absmax, s.code, *((s.offset, s.state2.absmax) if s.nested else ()))
            found[f"{path}.weight"] = (type(m.weight), id(m.weight), id(s), id(m.quant_state), m.compute_dtype, m.compute_type_is_set)
            found[f"{path}.bytes"] = [p.detach().clone() for p in parts]
            found[f"{path}.owner"] = m.weight.module is m
        elif isinstance(m, bnb.nn.Linear8bitLt):
            places = (m.weight.CB, m.weight.SCB, m.state.CB, m.state.SCB)
            found[f"{path}.weight"] = (type(m.weight), id(m.weight), id(m.state), *(None if p is None else id(p) for p in places))
            found[f"{path}.bytes"] = [p.detach().clone() for p in (m.weight.data, *places) if p is not None]
    return found


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    """Compare two results of `facts`."""

    def equal(a, b):
        return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b)) if isinstance(a, list) else a == b

    return before.keys() == after.keys() and all(equal(before[key], after[key]) for key in before)
