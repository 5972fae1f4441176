"""`Frozen`: everything about one linear map that is not trained, as a variant sees it.

`W(x)` is the layer's own output, `W.matmul(x)` leaves the bias out, `W.project(x, A)` is `A x`, `W.dense(dtype)` is the weight as a
matrix `(o, i)`, `W.constants` holds what the variant derived at build. The framework asks more of a layer: that is `lora_lite.Kind`.
"""

import copy
import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import linear

from lora_lite.core.autocast import autocasts
from lora_lite.core.linalg import add_low_rank, kaiming
from lora_lite.core.low_rank import added, both_of, low_rank_plus
from lora_lite.core.recompute import Vjp, linear_plus

Constants = dict[str, Tensor]
Params = Mapping[str, Tensor]
Start = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]

USES = {
    "output": "calls `W(x)`, the layer's own output",
    "project": "calls `W.project(x, A)`, a projection of the input, or `W.updated_low_rank`, which does",
    "vectors": "takes the input `x` itself, as vectors `(*b, i)`",
    "matmul": "calls `W.matmul`, the product without the bias, on vectors of its own",
    "rows": "calls `W.add_rows`, the output with some rows of the weight moved, as the layer stores it",
    "positions": "acts at some positions of a text, which `W.active` masks",
    "dense": "calls `W.dense()`, the weight as a matrix, at build or in the forward; norms of it too",
}
"""The parts of a layer, as words: a variant lists in `uses` the parts that it uses, a kind in `gives` the parts that it has."""


class NoConstants(dict[str, Tensor]):
    """The constants of a plain weight, which has none: a variant that cannot do without says so."""

    def __missing__(self, name: str) -> Tensor:
        way = "Take it from config.constants(W, generator) and pass Frozen(weight, bias, constants), or use build."
        raise ValueError(f"Frozen: expected the variant's constant {name!r} beside the weight, found a plain weight. {way}")


NONE = NoConstants()


class Frozen:
    """A frozen linear map `y = W x + b` with the constants that a variant keeps beside it.

    Args:
        weight: `(o, i)`.
        bias: `(o,)` or None.
        constants: the variant's frozen tensors, by name.
        training: whether the layer is in training mode; dropout asks for it.
    """

    gives: ClassVar[AbstractSet[str]] = frozenset(USES)
    sums: ClassVar[bool] = True
    """Whether the layer's output is `F.linear` with its weight to the bit, so that an update may be added to the weight beforehand.

    False for a subclass that has a `__call__` of its own and does not say so."""
    casts: bool = True
    """Whether a pure function casts the params to the dtype of `x`. False for a layer of a bound copy, whose call has done so."""
    constants: Params
    """The variant's frozen tensors, by name."""
    prompt: Tensor | None = None
    """For a block during a call: the mask of the positions that are prompt, `(b, t)`."""
    active: Tensor | None = None
    """During a call: the mask of the positions at which the variant acts, `(b, t)`; None for all."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.sums = vars(cls).get("sums", False)

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        constants: Params | None = None,
        training: bool = False,
    ) -> None:
        self._weight, self._bias, self._training = weight, bias, training
        self.constants = NONE if constants is None else constants

    @property
    def weight(self) -> Tensor:
        """The weight as `(o, i)`, a view where the layer stores it so."""
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """The bias `(o,)`, or None."""
        return self._bias

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self._training

    @property
    def _held(self) -> Tensor:
        """The tensor that has the weight's shape, device and dtype."""
        return self.weight

    @property
    def in_features(self) -> int:
        """Width of the input, `i`."""
        return self._held.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output, `o`."""
        return self._held.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self._held.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weight."""
        return self._held.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's own output, bias included: `(*b, i) -> (*b, o)`."""
        return F.linear(x, self.weight, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        """Return `W x` without the bias: `(*b, i) -> (*b, o)`."""
        return F.linear(x, self.weight)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        """Return `A drop(x)` for an `(r, i)` matrix: `(*b, i) -> (*b, r)`, with dropout in training mode."""
        return linear(self.dropped(x, dropout) if dropout else x, A)

    def dropped(self, x: Tensor, dropout: float) -> Tensor:
        """Return `x` with entries dropped at this probability in training mode, and `x` itself where nothing is dropped."""
        return F.dropout(x, dropout) if dropout and self.training else x

    def updated(self, x: Tensor, D: Tensor, dropout: float = 0.0) -> Tensor:
        """Return `W x + b + D drop(x)` for an `(o, i)` matrix: by the one product with `W + D` where that sum keeps the digits of `D`."""
        weight = self._summand(x, dropout)
        if weight is None or weight.dtype != D.dtype:
            return self(x) + self.project(x, D, dropout)
        return F.linear(x, weight + D, self.bias)

    def updated_at(self, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """Return `updated(x, S)` for the `(o, i)` matrix `S` to whose `places (k,)`, counted along its rows, the `values (k,)` are added.

        Where `W + S` keeps the digits of both, they are added to a copy of the weight: one pass over it instead of three.
        """
        shape, weight = (self.out_features, self.in_features), self._summand(x, 0.0)
        if weight is None or weight.dtype != values.dtype:
            return self.updated(x, values.new_zeros(math.prod(shape)).index_add(0, places, values).view(shape))
        return F.linear(x, weight.reshape(-1).index_add(0, places, values).view(shape), self.bias)

    def updated_by(
        self, x: Tensor, update: Callable[..., Tensor], *tensors: Tensor, dropout: float = 0.0, vjp: Vjp | None = None
    ) -> Tensor:
        """Return `updated(x, D)` for the matrix `D = update(*tensors)`, which the backward pass computes again instead of keeping it.

        Args:
            x: the input.
            update: a cheap function that draws no random numbers. It depends on trained tensors by its arguments alone.
            *tensors: its arguments, in the dtype of `x`; the backward pass keeps these.
            dropout: of the input of the update.
            vjp: a cheaper way to the sum with the weight and to the gradients, see `linear_plus`.
        """
        if type(self).project is not Frozen.project or autocasts(x):
            return self.updated(x, update(*tensors), dropout)
        shape, weight = (self.out_features, self.in_features), self._summand(x, dropout)
        if weight is None:
            return self(x) + linear_plus(self.dropped(x, dropout), shape, update, tensors, vjp=vjp)
        return linear_plus(x, shape, update, tensors, weight, self.bias, vjp)

    def updated_low_rank(
        self, x: Tensor, factors: tuple[Tensor, ...], scale: float = 1.0, dropout: float = 0.0, start: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Return `W x + b + scale B A drop(x)`, on a CPU in fewer passes over the output and over the gradient of `x` than one by one.

        Args:
            x: the input.
            factors: `A (r, i)` and `B (o, r)`, in the dtype of `x`; with a third, `S (r,)`, the update is `B diag(S) A`.
            scale: factor of the update.
            dropout: of the input of the update.
            start: fixed `A0`, `B0`, and `S0` beside `S`, that the factors are displacements from: the update is the change of the product,
                `(B0 + B) (A0 + A) - B0 A0`, computed so that nothing cancels.

        Raises:
            ValueError: where only one of factors and start has an `S`.
        """
        given, begun = both_of(factors, start)
        plain = type(self).project is Frozen.project and not x.is_cuda
        weight = self._summand(x, dropout) if plain else None
        if weight is not None and given.A.dtype == weight.dtype:
            return low_rank_plus(x, weight, self.bias, given, scale, begun)
        if begun is not None:
            return added(self(x), self.dropped(x, dropout), given, scale, begun)
        return add_low_rank(self(x), self.project(x, given.A, dropout), given.B, scale)

    def _summand(self, x: Tensor, dropout: float) -> Tensor | None:
        """Return the weight where the sum with an update keeps the digits of both, else None."""
        if not self.sums or (dropout and self.training) or torch.finfo(x.dtype).bits < 32 or autocasts(x):
            return None
        weight = self.weight
        return weight if type(weight) in (torch.nn.Parameter, Tensor) and weight.dtype == x.dtype else None

    @property
    def table_shape(self) -> tuple[int, int]:
        """The number and the width of the rows that `add_rows` moves: `(o, i)`, and `(i, o)` of an embedding, which stores `W^T`."""
        return self.out_features, self.in_features

    def add_rows(self, x: Tensor, index: Tensor, D: Tensor) -> Tensor:
        """Return the output with rows of the stored weight moved, `(*b, i) -> (*b, o)`; of a linear layer a row is an output.

        Args:
            x: the input.
            index: the rows, `(n,)`, each once.
            D: their displacements, `(n, i)`, and `(n, o)` of an embedding.
        """
        y = self(x)
        return y.index_add(-1, index, self.project(x, D).to(y.dtype))  # under autocast one of them may be wide

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the detached weight as a plain `(o, i)` matrix, in `dtype` or else in its own."""
        weight = self.weight.detach()
        return weight if dtype is None else weight.to(dtype)

    def with_constants(self, constants: Params) -> Self:
        """Return the same layer with these constants."""
        other = copy.copy(self)
        other.constants = dict(constants)
        return other

    def low_rank_start(self, r: int, generator: torch.Generator, draw: Start | None = None) -> tuple[Tensor, Tensor]:
        """Draw the factors of an update that starts at zero: `A (r, i)` uniform within 1/sqrt(i), and `B (o, r)` of zeros.

        A variant that starts elsewhere passes `draw(r, i, o, generator) -> (A, B)`.
        """
        if draw is not None:
            return draw(r, self.in_features, self.out_features, generator)
        return kaiming(r, self.in_features, generator), torch.zeros(self.out_features, r)

    def vectors(self, x: Tensor) -> Tensor:
        """Return the input as vectors `(*b, i)`. Token ids are not vectors: for them, a meta tensor of that shape."""
        return x

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters that a full training of the layer moves, by name."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def moved(self, deltas: Mapping[str, Tensor]) -> Callable[[Any], Any]:
        """Return the layer with `deltas` added to its `parameters`, as a function of its input."""
        now = {name: p + deltas[name] if name in deltas else p for name, p in self.parameters.items()}
        return Frozen(now["weight"], now.get("bias"))


def plus(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias, if any, to a finished product. `F.linear` adds it before the product is rounded."""
    return y if bias is None else y + bias


class Stored(Frozen):
    """A layer of which reading the weight is more than a look: its shape, device and dtype are those of the tensor that it holds."""

    @property
    def _held(self) -> Tensor:
        return self._weight


def as_frozen(W: Frozen | Tensor) -> Frozen:
    """Wrap a plain `(o, i)` weight. A `Frozen` is returned as it is."""
    return Frozen(W) if isinstance(W, Tensor) else W


def dtype_for(W: Frozen, x: Tensor) -> torch.dtype:
    """Return the dtype that a variant computes in: that of `x`, or of the weight where `x` holds token ids."""
    dtype = x.dtype
    return dtype if dtype.is_floating_point else W.dtype


def in_dtype(params: Mapping[str, Tensor], W: Frozen, x: Tensor) -> Mapping[str, Tensor]:
    """Return the params in the dtype that the variant computes in, `dtype_for(W, x)`.

    The same object where nothing changes: every call of every layer passes here.
    """
    dtype = dtype_for(W, x)
    for p in params.values():
        if p.dtype is not dtype:
            return {name: p.to(dtype) for name, p in params.items()}
    return params
