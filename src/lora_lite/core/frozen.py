"""`Frozen`: everything about one target layer that is not trained. One class per kind of layer.

A variant sees a layer only through this class: `W(x)` is the layer's own output, `W.matmul(x)` leaves the bias out,
`W.dense(dtype)` is the weight as an `(o, i)` matrix, `W.constants` holds what the variant derived from it at build.
A kind says in `gives` which of the words of `USES` it has an answer to; a variant's `uses` must be among them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

USES = {
    "output": "calls `W(x)`, the layer's own output",
    "project": "calls `W.project(x, A)`, a projection of the input",
    "vectors": "takes the input `x` itself, as vectors `(*b, i)`",
    "matmul": "calls `W.matmul`, the product without the bias, on vectors of its own",
    "dense": "calls `W.dense()`, the weight as a matrix, at build or in the forward; norms of it too",
}
"""The words of a variant's `uses` and a kind's `gives`: which parts of a layer a variant uses, and which a kind of layer has."""

Constants = dict[str, Tensor]
Params = Mapping[str, Tensor]
Run = Callable[[Any, Tensor], Tensor]

PARAM, CONSTANT = "adapter_", "constant_"
"""Prefixes of the attributes that hold a target's params and constants in a clone."""


class Frozen:
    """A frozen linear map `y = W x + b` with the constants that a variant keeps beside it.

    Args:
        weight: `(o, i)`.
        bias: `(o,)` or None.
        constants: the variant's frozen tensors, by name.
        training: whether the layer is in training mode; dropout asks for it.
    """

    gives: ClassVar[AbstractSet[str]] = frozenset(USES)
    _replaced: Mapping[str, Tensor] | None = None
    """Constants in place of those that the layer holds."""
    one_hot: ClassVar[bool] = False
    """Whether an input picks one column of the weight, as a token does."""
    observed: ClassVar[bool] = True
    """Whether calibration can see its input as rows."""
    why: ClassVar[str] = ""
    """Why it refuses what it refuses, in a sentence."""
    has_input: ClassVar[bool] = True
    """Whether the layer is called with an input of the batch's rows; else its weight is read by the module around it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        constants: Mapping[str, Tensor] = MappingProxyType({}),
        training: bool = False,
    ) -> None:
        self._weight, self._bias, self._constants, self._training = weight, bias, constants, training

    @property
    def weight(self) -> Tensor:
        """The weight as `(o, i)`, a view where the layer stores it so."""
        return self._weight

    @property
    def bias(self) -> Tensor | None:
        """The bias `(o,)`, or None."""
        return self._bias

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The variant's frozen tensors; empty before the variant has derived them."""
        return self._constants

    def with_constants(self, constants: Mapping[str, Tensor]) -> Self:
        """Return the same layer with other constants."""
        W = copy.copy(self)
        W._constants = W._replaced = constants
        return W

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self._training

    @property
    def in_features(self) -> int:
        """Width of the input, `i`."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output, `o`."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weight."""
        return self.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's own output, bias included: `(*b, i) -> (*b, o)`."""
        return F.linear(x, self.weight, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        """`W x` without the bias: `(*b, i) -> (*b, o)`."""
        return F.linear(x, self.weight)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        """`A drop(x)` for an `(r, i)` matrix: `(*b, i) -> (*b, r)`, with dropout in training mode."""
        return F.linear(F.dropout(x, dropout, self.training) if dropout else x, A)

    def rows(self, x: Tensor) -> Tensor:
        """Return the input as vectors `(*b, i)`. Token ids are not vectors: for them, a meta tensor of that shape."""
        return x

    def entered(self, x: Tensor, uses: AbstractSet[str]) -> "tuple[Frozen, Tensor]":
        """Return the layer and its input in the form that a variant of these `uses` takes."""
        return self, x

    @property
    def stacked(self) -> bool:
        """Whether params and constants have a first axis of `parts`."""
        return False

    @property
    def parts(self) -> "Sequence[Frozen]":
        """The linear maps that the layer is made of: itself, or one for each expert."""
        return (self,)

    def split(self, params: Mapping[str, Tensor]) -> Sequence[Mapping[str, Tensor]]:
        """Return the params of each part."""
        return (params,)

    def over_parts(self, f: Callable[..., Tensor], params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Apply `f(params, W, x)` to each part with its share of the input."""
        return f(params, self, x)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a plain `(o, i)` matrix in `dtype`, or in its own; detached."""
        weight = self.weight.detach()
        return weight if dtype is None else weight.to(dtype)

    def to_weight(self, dense: Tensor) -> Tensor:
        """Lay an `(o, i)` matrix out as the layer stores its weight."""
        return dense

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """What a full training of the layer would train, by name."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def moved(self, deltas: Mapping[str, Tensor]) -> Callable[[Any], Any]:
        """Return the layer with `deltas` added to its `parameters`, as a function of its input."""
        now = {name: p + deltas[name] if name in deltas else p for name, p in self.parameters.items()}
        return Frozen(now["weight"], now.get("bias"))


class FrozenLinear(Frozen):
    """The kind of `nn.Linear`: reads the layer at each call, so that tensors bound for one call are seen."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether this kind reads a module."""
        return isinstance(layer, nn.Linear)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        """Whether the class of a module that fits computes what the kind does, and not something of its own."""
        return type(layer).forward is nn.Linear.forward

    def __init__(self, layer: Any, constant_names: Mapping[str, str] = MappingProxyType({})) -> None:
        self._layer, self.constant_names = layer, constant_names

    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self._layer.bias

    @property
    def constants(self) -> Mapping[str, Tensor]:
        if self._replaced is not None:
            return self._replaced
        return {name: getattr(self._layer, attribute) for name, attribute in self.constant_names.items()}

    @property
    def training(self) -> bool:
        return self._layer.training

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a variant where the model calls the layer.

        Args:
            run: `(W, x) -> y`, the variant with its params.
            own: the layer's own forward.
            args, kwargs: what the model calls the layer with.
        """
        return run(self, first_of(args, kwargs))


class _OfTransformers(FrozenLinear):
    """A linear layer of transformers' own, told by the name of its class: importing transformers to ask would make it a dependency."""

    told_by: ClassVar[str]

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return any(c.__name__ == cls.told_by and c.__module__.startswith("transformers.") for c in type(layer).__mro__)

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        return next(c for c in type(layer).__mro__ if "forward" in vars(c)).__name__ == cls.told_by


class FrozenFalconLinear(_OfTransformers):
    """The kind of transformers' `FalconLinear`: an `nn.Linear` whose bias is added after the product has been rounded."""

    told_by = "FalconLinear"

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self.matmul(x), self.bias)


class FrozenConv1D(_OfTransformers):
    """The kind of transformers' `Conv1D`, which stores `(i, o)`."""

    told_by = "Conv1D"

    @property
    def weight(self) -> Tensor:
        return self._layer.weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self._layer.bias, x.reshape(-1, x.shape[-1]), self._layer.weight)  # as the layer itself computes it
        return flat.view(*x.shape[:-1], -1)

    def to_weight(self, dense: Tensor) -> Tensor:
        return dense.t().contiguous()


def plus(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias, where there is one, as an operation of its own; `F.linear` adds it before it rounds."""
    return y if bias is None else y + bias


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def as_frozen(W: Frozen | Tensor) -> Frozen:
    """Wrap a plain `(o, i)` weight; a `Frozen` stays itself."""
    return Frozen(W) if isinstance(W, Tensor) else W
