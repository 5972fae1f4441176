"""bitsandbytes' `Linear4bit` and `Linear8bitLt`.

bitsandbytes rewrites its layers as they run: `Linear8bitLt` moves its scales from the weight to the layer, `Linear4bit` picks a compute
dtype and, on some processors, repacks its weight for evaluation. So a layer of a clone gets bookkeeping of its own and keeps the
packed tensors it was made with. The library is recognised by name and used through its registered operations: it stays optional.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.layers.quantised import FrozenQuantised

_PACKED = "_lora_lite_packed"
_ABSMAX = "_lora_lite_absmax"
_LANES = 32  # rows that the layout for evaluation on a CPU interleaves


class _Scales(NamedTuple):
    """Double quantisation: the quantised form of a weight's scales."""

    absmax: Tensor
    code: Tensor
    blocksize: int
    offset: Tensor


class _Packed4bit(NamedTuple):
    absmax: Tensor | None  # None where the layer has them as a parameter, to be split
    nested: _Scales | None
    blocksize: int
    quant_type: str
    shape: tuple[int, ...]


class _Packed8bit(NamedTuple):
    scales: Tensor


def _is(cls: Any, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith("bitsandbytes.") for c in cls.__mro__)


class _FrozenBitsandbytes(FrozenQuantised):
    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        owner = next(c for c in type(layer).__mro__ if "forward" in vars(c))
        return owner.__module__.startswith("bitsandbytes.")

    @property
    def _packed(self) -> Any:
        return vars(self.layer)[_PACKED]


class Linear4bitKind(_FrozenBitsandbytes):
    """bitsandbytes' `Linear4bit`: nf4 or fp4 in blocks, with or without double quantisation."""

    @classmethod
    def may_fit(cls, of: type[nn.Module]) -> bool:
        return _is(of, "Linear4bit")

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        state = _quant_state(layer)
        if state is None:
            return "is not quantised yet: move the model to its device, model.to(device), which does it"
        if tuple(state.shape) != (layer.out_features, layer.in_features):
            found, want = tuple(state.shape), (layer.out_features, layer.in_features)
            return f"was quantised from a weight of shape {found}, not {want}: quantise it anew, as (out_features, in_features)"
        return None

    @classmethod
    def isolate(cls, layer: Any) -> None:
        state = copy.copy(_quant_state(layer))
        state.state2 = copy.copy(getattr(state, "state2", None))
        if getattr(state, "packing_format_for_cpu", False):
            layer.weight.data = _unpacked(layer.weight.detach(), state)
        layer.quant_state = layer.weight.quant_state = state
        layer.weight.module = layer
        nested = _Scales(state.state2.absmax, state.state2.code, state.state2.blocksize, state.offset) if state.nested else None
        vars(layer)[_PACKED] = _Packed4bit(state.absmax, nested, state.blocksize, state.quant_type, tuple(state.shape))

    @classmethod
    def distribute(cls, layer: Any, device: torch.device) -> None:
        state = layer.quant_state  # the layer's own, by `isolate`
        layer._parameters["weight"] = nn.Parameter(layer.weight.detach(), requires_grad=False)
        layer.register_parameter(_ABSMAX, nn.Parameter(state.absmax, requires_grad=False))
        state.absmax = None
        state.code = state.code.to(device, copy=True)
        if state.nested:
            state.offset = state.offset.to(device, copy=True)
            state.state2.absmax, state.state2.code = (t.to(device, copy=True) for t in (state.state2.absmax, state.state2.code))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        absmax, nested, blocksize, quant_type, shape = self._packed
        data = self.layer.weight.detach()
        if absmax is None:
            absmax = getattr(self.layer, _ABSMAX).detach()
        if nested is not None:
            scales = torch.ops.bitsandbytes.dequantize_blockwise.default
            absmax = scales(absmax, nested.absmax, nested.code, nested.blocksize, torch.float32) + nested.offset
        kernel = torch.float32 if dtype == torch.float64 else dtype
        return torch.ops.bitsandbytes.dequantize_4bit.default(data, absmax, blocksize, quant_type, shape, kernel).to(dtype)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.layer.compute_dtype or dtype


class Linear8bitKind(_FrozenBitsandbytes):
    """bitsandbytes' `Linear8bitLt`: the map `CB SCB / 127`, in training and evaluation alike.

    The layer's own forward quantises the activations in evaluation, outliers aside. That is no linear map and has no derivative, so the
    adapted model leaves it out.
    """

    @classmethod
    def may_fit(cls, of: type[nn.Module]) -> bool:
        return _is(of, "Linear8bitLt")

    @classmethod
    def fault(cls, layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return "keeps 16-bit weights (has_fp16_weights=True): make it with has_fp16_weights=False"
        if layer.weight.dtype != torch.int8 or _scales(layer) is None:
            return "is not quantised yet: move the model to its device, model.to(device), which does it"
        return None

    @classmethod
    def isolate(cls, layer: Any) -> None:
        layer.state = copy.copy(layer.state)
        vars(layer)[_PACKED] = _Packed8bit(_scales(layer))

    @classmethod
    def distribute(cls, layer: Any, device: torch.device) -> None:
        layer.state.CB, layer.state.SCB = None, _scales(layer).to(device, copy=True)
        layer._parameters["weight"] = nn.Parameter(layer.weight.detach(), requires_grad=False)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        codes, (scales,) = self.layer.weight.detach(), self._packed
        return codes.to(dtype).mul_((scales / 127)[:, None])  # in place: no second dense matrix, and a low dtype is rounded to once

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        codes, (scales,) = self.layer.weight.detach(), self._packed
        # In the order of the definition, to its last digit: an SVD magnifies digits, and this is not run for every product.
        return (codes * scales[:, None] / 127).to(dtype or self.dtype)


def _quant_state(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _scales(layer: Any) -> Any:
    scales = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if scales is None else scales  # the layer's first forward moves them


def _unpacked(data: Tensor, state: Any) -> Tensor:
    """Undo the layout that bitsandbytes gives a weight for evaluation on a CPU: a copy, and `state` set right for it."""
    o, i = state.shape
    pairs = data.reshape(-1, _LANES)
    nibbles = torch.cat([pairs & 15, pairs >> 4], 1)  # (o / 32 * i / 2, 64)
    nibbles = nibbles.view(o // _LANES, i // 2, _LANES, 2).transpose(1, 2).reshape(-1, 2)  # (o i / 2, 2)
    state.absmax = state.absmax.t().reshape(-1).float()  # bitsandbytes has rounded them to bfloat16 and dropped what they were
    state.nested, state.packing_format_for_cpu = False, False
    state.dtype = state.original_dtype
    flat = (nibbles[:, 0] << 4 | nibbles[:, 1]).view(state.original_qshape)
    return flat.view(getattr(state, "original_storage_type", None) or torch.uint8)
