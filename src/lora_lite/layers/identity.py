"""A variant at the rows of the identity, which are its matrix, and on meta, where it is counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.frozen import Frozen, Params, plus
from lora_lite.core.tracing import in_transform

Variant = Callable[[Params, Frozen, Any], Any]
"""A variant's function of params, layer and input."""


ROWS = 256
"""The most rows of the identity at once, without a gradient: all of a wide layer's would take more memory than the layer."""


class AtIdentity(Frozen):
    """A linear map that gives its own transpose at `points`, rows of the identity, without a product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, constants: Params) -> None:
        super().__init__(weight, bias, constants)
        self._points: Tensor | None = None
        self._rows = slice(None)

    def points(self, rows: slice) -> Tensor:
        """Return rows of the identity, `(n, i)`, and give their values from now on."""
        self._rows, eye = rows, torch.eye(self.in_features, dtype=self.dtype, device=self.device) if rows == slice(None) else None
        if eye is None:
            eye = torch.zeros(rows.stop - rows.start, self.in_features, dtype=self.dtype, device=self.device)
            eye.diagonal(rows.start).fill_(1.0)
        self._points = eye
        return eye

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self.weight.t()[self._rows], self.bias) if x is self._points else super().__call__(x)

    def matmul(self, x: Tensor) -> Tensor:
        return self.weight.t()[self._rows] if x is self._points else super().matmul(x)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        return A.t()[self._rows] if x is self._points else super().project(x, A, dropout)


def at_identity(f: Variant, params: Params, W: Frozen, role: str, dtype: torch.dtype | None) -> Tensor:
    """Return the `weight` `(o, i)` or the `bias` `(o,)` of a linear map with a variant on it, evaluated in `dtype`."""
    weight = W.dense(dtype)
    bias = W.bias.detach().to(weight.dtype) if role == "bias" and W.bias is not None else None
    at = AtIdentity(weight, bias, W.constants)
    offset = f(params, at, weight.new_zeros(1, W.in_features))[0]
    if role == "bias":
        return offset
    i = W.in_features
    if i <= ROWS or torch.is_grad_enabled() or in_transform():
        return (f(params, at, at.points(slice(None))) - offset).t()
    parts = (f(params, at, at.points(slice(k, min(k + ROWS, i)))) - offset for k in range(0, i, ROWS))
    found = weight.new_empty(i, W.out_features)  # once, rather than beside its parts
    for k, part in enumerate(parts):
        found[k * ROWS : (k + 1) * ROWS] = part
    return found.t()


def adapted_part(W: Frozen, f: Variant, params: Params, role: str, dtype: torch.dtype) -> Tensor:
    """Return `at_identity` of a linear map, with the arguments in the order of `Kind.adapted`."""
    return at_identity(f, params, W, role, dtype)


def on_meta(W: Frozen, tokens: int) -> tuple[Frozen, Tensor, int]:
    """Return a linear map and an input of `tokens` tokens on meta, and the map's own multiply-adds for one token."""
    constants = {name: torch.empty(c.shape, dtype=c.dtype, device="meta") for name, c in W.constants.items()}
    bias = None if W.bias is None else torch.empty(W.out_features, device="meta")
    layer = Frozen(torch.empty(W.out_features, W.in_features, device="meta"), bias, constants)
    return layer, torch.empty(tokens, W.in_features, device="meta"), W.in_features * W.out_features


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which merged weights are computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)
