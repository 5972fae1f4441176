"""A variant at the rows of the identity, which are its matrix, and on meta, where it is counted."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_lite.core.frozen import Frozen, Params, Stored, plus
from lora_lite.core.tracing import in_transform

Variant = Callable[[Params, Frozen, Any], Any]
"""A variant's function of params, layer and input."""


ROWS = 256
"""The most rows of the identity at once, without a gradient: all of a wide layer's would take more memory than the layer."""

PART = 2**24
"""The bytes, 16 MiB, of the largest part of a weight that is merged at once: a merge holds a few such parts, whatever the layer's size."""

BLOCK = 2**22
"""The bytes, 4 MiB, of the rows of a large weight that are read or written at once."""

_ALIGNMENT = 64
"""The bytes to which torch aligns a tensor's memory."""

Release = Callable[[], None]
"""A function to call when a part of a weight has been read: a mapped file lets go of its pages."""


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

    def _own(self) -> Tensor:
        return self.weight.t()[self._rows]

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self._own(), self.bias) if x is self._points else super().__call__(x)

    def matmul(self, x: Tensor) -> Tensor:
        return self._own() if x is self._points else super().matmul(x)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        return A.t()[self._rows] if x is self._points else super().project(x, A, dropout)


class InBlocks(Stored, AtIdentity):
    """The same of a weight that is cast a block of rows at a time where it is read. A whole copy is made only if a variant asks for one.

    Each block is a copy, even where there is nothing to cast: products over tensors of a mapped file, which are not aligned, round
    otherwise than those over the same values in memory.
    """

    def __init__(self, W: Frozen, dtype: torch.dtype, release: Release, bias: Tensor | None = None) -> None:
        weight = W.weight.detach() if type(W).dense is Frozen.dense else W.dense(dtype)  # others make a dense weight of a packed one
        super().__init__(weight, bias, W.constants)
        self._dtype, self._release = dtype, release
        self._size = block_rows(weight.shape[1], dtype)
        self._whole = self._cast(weight) if self._size >= len(weight) else None

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def weight(self) -> Tensor:
        if self._whole is None:
            self._whole = self._cast(self._weight)
        return self._whole

    def _cast(self, part: Tensor) -> Tensor:
        found = part.to(self._dtype, copy=True)
        self._release()
        return found

    def _blocks(self) -> Iterator[slice]:
        return (slice(k, k + self._size) for k in range(0, self.out_features, self._size))

    def _own(self) -> Tensor:
        if self._whole is not None:
            return super()._own()
        found = torch.empty(self._rows.stop - self._rows.start, self.out_features, dtype=self.dtype, device=self.device)
        for block in self._blocks():
            found[:, block] = self._cast(self._weight[block, self._rows]).t()
        return found

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self.matmul(x), self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        if x is self._points or self._whole is not None:
            return super().matmul(x)
        found = x.new_empty(*x.shape[:-1], self.out_features)
        for block in self._blocks():
            found[..., block] = linear(x, self._cast(self._weight[block]))
        return found


def block_rows(width: int, dtype: torch.dtype, size: int | None = None) -> int:
    """Return the number of rows of `width` entries that take `size` bytes, by default those of a block; at least one."""
    return max(1, (size or BLOCK) // (max(width, 1) * dtype.itemsize))


def at_identity(f: Variant, params: Params, W: Frozen, role: str, dtype: torch.dtype | None) -> Tensor:
    """Return the `weight` `(o, i)` or the `bias` `(o,)` of a linear map with a variant on it, evaluated in `dtype`."""
    weight = _aligned(W.dense(dtype))
    bias = W.bias.detach().to(weight.dtype) if role == "bias" and W.bias is not None else None
    at = AtIdentity(weight, bias, W.constants)
    offset = _at_zero(f, params, at)
    if role == "bias":
        return offset
    i = W.in_features
    if i <= ROWS or torch.is_grad_enabled() or in_transform():
        return (_run(f, params, at, at.points(slice(None))) - offset).t()
    parts = (_run(f, params, at, at.points(slice(k, min(k + ROWS, i)))) - offset for k in range(0, i, ROWS))
    found = weight.new_empty(i, W.out_features)  # once, rather than beside its parts
    for k, part in enumerate(parts):
        found[k * ROWS : (k + 1) * ROWS] = part
    return found.t()


@torch.no_grad()
def columns(f: Variant, params: Params, W: Frozen, dtype: torch.dtype, release: Release) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight `(o, i)` of a linear map with a variant on it, evaluated in `dtype`, some columns `(o, n)` at a time.

    The memory that it takes is that of a few parts, unless the variant reads the whole weight or forms a whole update.
    """
    at = InBlocks(W, dtype, release)
    i, o = at.in_features, at.out_features
    offset = _at_zero(f, params, at)
    n = min(ROWS, block_rows(max(i, o), dtype, PART))
    for k in range(0, i, n):
        where = slice(k, min(k + n, i))
        yield where, (_run(f, params, at, at.points(where)) - offset).t()


@torch.no_grad()
def offset_of(f: Variant, params: Params, W: Frozen, dtype: torch.dtype, release: Release) -> Tensor:
    """Return the bias `(o,)` of a linear map with a variant on it, evaluated in `dtype`, in the memory that `columns` takes."""
    return _at_zero(f, params, InBlocks(W, dtype, release, None if W.bias is None else W.bias.detach().to(dtype)))


def _at_zero(f: Variant, params: Params, W: Frozen) -> Tensor:
    return _run(f, params, W, torch.zeros(1, W.in_features, dtype=W.dtype, device=W.device))[0]


def _run(f: Variant, params: Params, W: Frozen, x: Tensor) -> Tensor:
    """Run a variant on vectors. Its outputs would be spread over the weight where they have another width."""
    y: Any = f(params, W, x)
    found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    if found != (len(x), W.out_features):
        name = type(getattr(getattr(f, "forward", None), "__self__", f)).__name__
        raise ValueError(
            f"{name}.forward: expected an output of shape {(len(x), W.out_features)} for an input {tuple(x.shape)}, found {found}. "
            "Return W(x) + update, an update (*b, o)."
        )
    return y


def laid_out_as(own: Tensor, t: Tensor) -> Tensor:
    """Return a tensor laid out in memory as the layer's own is: on some processors products with another layout round otherwise."""
    strides = own.stride()
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


def _aligned(weight: Tensor) -> Tensor:
    """Copy a tensor that is not aligned, as in a mapped file: products over it may round otherwise than those over a copy."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_meta and not in_transform()
    return weight.clone() if plain and weight.data_ptr() % _ALIGNMENT else weight


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
