"""The tensors of a layer: how a kind reads them, lays them out, and merges an adapter into them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen, Params, in_dtype
from lora_lite.core.tree import join
from lora_lite.layers.access import HOST
from lora_lite.layers.identity import Release, adapted_part, at_identity, columns, exact_dtype, laid_out_as, offset_of, on_meta

Part = tuple[str, Any, Tensor]
"""A part of a merged tensor: the tensor's name in the module, the index of the part, and the part."""


class Variant:
    """A config's function as the kinds apply it: `(params, W, x) -> y`, params cast to the dtype of the call unless it casts itself."""

    def __init__(self, cfg: AdapterConfig) -> None:
        self.forward, self.uses, self.cast = cfg.forward, cfg.uses, cfg.cast

    def __call__(self, params: Params, W: Frozen, x: Any) -> Any:
        return self.forward(in_dtype(params, W, x) if self.cast else params, W, x)


class Tensors(Frozen):
    """The part of a kind that knows a layer's tensors; `Kind` has the part that finds layers and reaches their calls.

    Args:
        layer: the module. Its attributes are the frozen tensors, whatever is adapted.
        constants: the variant's frozen tensors, by name.
    """

    state: ClassVar[Mapping[str, str]] = {"weight": "weight", "bias": "bias"}
    """The names under which the module keeps its weight and its bias."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if {"merged", "adapted"} & set(vars(cls)) and "merged_parts" not in vars(cls):
            cls.merged_parts = _whole  # type: ignore[assignment, method-assign]  # the parts that it would inherit are of another map

    def __init__(self, layer: Any, constants: Params | None = None) -> None:
        self.layer, self.constants = layer, {} if constants is None else dict(constants)

    @classmethod
    def host(cls, path: str) -> str:
        """Return the path of the module that a target at `path` belongs to, by default its own."""
        return path

    def own(self, role: str) -> Tensor | None:
        """Return the tensor that the module keeps as its `weight` or `bias`."""
        name = self.state.get(role)
        if name is None:
            return None
        table = self.layer._parameters
        return table[name] if name in table else getattr(self.layer, name, None)

    def stored(self, role: str) -> Tensor:
        """Return the same where the kind relies on it.

        Raises:
            AttributeError: where the module keeps none under that name.
        """
        tensor = self.own(role)
        if tensor is None:
            raise AttributeError(f"{type(self).__name__}: expected a {role} at {self.state.get(role)!r}, found none. Set its state.")
        return tensor

    @property
    def weight(self) -> Tensor:
        return self.stored("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.own("bias")

    @property
    def training(self) -> bool:
        return getattr(self.layer, HOST, self.layer).training

    def to_weight(self, dense: Tensor) -> Tensor:
        """Lay an `(o, i)` matrix out as the layer stores its weight."""
        return dense

    def to_bias(self, bias: Tensor) -> Tensor:
        """Lay a bias `(o,)` out as the layer stores its own."""
        return bias

    def make(self, tree: Callable[[Frozen], Params]) -> dict[str, Tensor]:
        """Build a layer's params or constants by `tree`, which builds those of one linear map. Several maps are joined."""
        return dict(tree(self))

    def pairs(self, params: Params) -> Sequence[tuple[Frozen, Params]]:
        """Return each linear map of the layer with its params, in the order of `make`."""
        return [(self, params)]

    # What merging and counting mean

    def adapted(self, f: Variant, params: Params, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the layer's `weight` or `bias` with the adapter in it: `b' = f(0)`, `W' = f(I) - f(0)` without a bias.

        Args:
            f: the variant.
            params: the target's params.
            role: `"weight"` or `"bias"`.
            dtype: of the evaluation and of the result; None for the weight's own.

        Returns:
            The weight `(o, i)`, or the bias `(o,)`; differentiable in `params`.
        """
        return at_identity(f, params, self, role, dtype)

    def merged(self, f: Variant, params: Params) -> dict[str, Tensor]:
        """Return the layer's tensors with the adapter merged, in the module's own names and layout, in at least float32.

        Raises:
            ValueError: where the layer has no place for them.
        """
        # The weight last: another copy of it serves for the bias.
        bias, weight = (self.adapted(f, params, role, exact_dtype(self.dtype)) for role in ("bias", "weight"))
        return {self.state["weight"]: self.to_weight(weight), **self._with_bias(bias)}

    def _with_bias(self, bias: Tensor) -> dict[str, Tensor]:
        if self.bias is not None:
            return {self.state["bias"]: self.to_bias(bias)}
        if bias.isnan().any():
            raise ValueError("its params, or tensors beside them, are not finite, so that nothing can be merged")
        if bias.any():
            raise ValueError("the adapter moves the bias, and the layer has none to hold it")
        return {}

    def merged_parts(self, f: Variant, params: Params, release: Release = lambda: None) -> Iterator[Part]:
        """Yield the tensors of `merged` in parts, so that a large weight is never whole in float32.

        A kind that defines `merged` or `adapted` yields whole tensors, unless it defines this too.

        Args:
            f: the variant.
            params: the target's params.
            release: called when a part of the weight has been read.

        Raises:
            ValueError: where the layer has no place for them, before the first part.
        """
        dtype, name = exact_dtype(self.dtype), self.state["weight"]
        beside = self._with_bias(offset_of(f, params, self, dtype, release))
        transposed = self._stores_transpose()
        if transposed is None:
            yield name, ..., self.to_weight(self.adapted(f, params, "weight", dtype))
        else:
            for where, part in columns(f, params, self, dtype, release):
                yield (name, where, part.t()) if transposed else (name, (slice(None), where), part)
        for bias, tensor in beside.items():
            yield bias, ..., tensor

    def _stores_transpose(self) -> bool | None:
        """Whether the layer stores the transpose of its matrix `(o, i)`. None where it stores neither as it is."""
        if type(self).to_weight is Tensors.to_weight:
            return False
        dense = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)
        stored = self.to_weight(dense)
        layouts = [(dense.shape, dense.stride()), (dense.t().shape, dense.t().stride())]
        found = (stored.shape, stored.stride())
        return bool(layouts.index(found)) if found in layouts and stored.data_ptr() == dense.data_ptr() else None

    def kept(self) -> dict[str, Tensor]:
        """Return the layer's tensors that `merged` replaces, under the same names. A packed weight is returned dense.

        A kind whose `merged` has other names than its `state` defines this too. Where the module keeps no weight under the name of
        `state`, these are all of its own tensors.

        Raises:
            ValueError: where no entry of a state dict holds the weight.
        """
        name = self.state.get("weight")
        if type(self).merged is not Tensors.merged and self.own("weight") is None:
            return {**self.layer._parameters, **self.layer._buffers}
        if name is None:
            raise ValueError(
                f"{type(self).__name__}.state names no weight of the module, found {dict(self.state)}, so no state dict holds it. Set it, "
                "or define merged(f, params)"
            )
        if name not in self.layer._parameters:
            raise ValueError(f"its weight is computed by a parametrization or kept in no parameter {name!r}, so no state dict holds it")
        kept = {name: self.layer._parameters[name]}
        if self.bias is None:
            return kept
        own = self.own("bias")
        if own is None:
            raise ValueError(
                f"{type(self).__name__}.state names no bias of the module, found {dict(self.state)}, so no state dict holds it"
            )
        return {**kept, self.state["bias"]: own}

    def read(self, f: Variant, params: Params, name: str) -> Tensor:
        """Return a parameter of the module with the adapter in it, where the model reads it instead of calling the layer.

        Args:
            f: the variant.
            params: the target's params.
            name: the parameter's name in the module.
        """
        role = next(role for role, own in self.state.items() if own == name)
        tensor = self.adapted(f, params, role)
        return laid_out_as(self.stored(role), self.to_weight(tensor) if role == "weight" else self.to_bias(tensor))

    def shifts(self, f: Variant, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a variant adds a constant to outputs of a layer that has no bias to hold it."""
        if self.bias is not None or "weight" not in self.state:
            return False
        ones = {name: torch.ones(shape, dtype=self.dtype, device=self.device) for name, shape in shapes.items()}
        W, params = self.pairs(ones)[0]
        zeros = torch.zeros(1, W.in_features, dtype=self.dtype, device=self.device)
        return bool(f(params, Frozen(W.dense(), None, W.constants), zeros).any())

    @property
    def moving(self) -> bool:
        """Whether a call runs that has adapted tensors in the place of the module's own. Such a kind has `moved_in` and `swapped`."""
        return False

    def readable(self) -> list[str]:
        """List the module's parameters that `read` can return."""
        return [name for name in self.state.values() if self.layer._parameters.get(name) is not None]

    def changes(self, f: Variant, params: Params) -> list[tuple[Tensor, Tensor]]:
        """Return the update of the weight `(o, i)` and the bias `(o,)` of each linear map in float64, in the order of `make`."""
        found = []
        for W, leaves in self.pairs(params):
            adapted = self.adapted if W is self else functools.partial(adapted_part, W)
            weight, bias = (adapted(f, leaves, role, torch.float64) for role in ("weight", "bias"))
            found.append((weight - W.dense(torch.float64), bias if W.bias is None else bias - W.bias.detach().double()))
        return found

    def displacements(self, f: Variant, params: Params) -> Mapping[str, Tensor] | None:
        """Return the displacements of a module's parameters by name, for a kind whose module is no linear map. None for the others."""
        return None

    def probe(self, tokens: int) -> list[tuple[str, Frozen, Tensor, int]]:
        """Return each linear map that counts: its name, the map, an input of `tokens` tokens on meta, and its multiply-adds a token."""
        return [("", *on_meta(self, tokens))]

    def part(self, tree: Params, name: str) -> Params:
        """Return the params of the linear map that `probe` names."""
        return tree

    def original(self, weights: Mapping[str, Tensor], path: str) -> tuple[str, Tensor | None]:
        """Find the weight from before quantisation: its name in a state dict, and the weight `(o, i)` or None."""
        name = join(self.host(path), self.state["weight"])
        return name, weights.get(name)


def _whole(W: Tensors, f: Variant, params: Params, release: Release = lambda: None) -> Iterator[Part]:
    """Yield the whole tensors of `merged`.

    Raises:
        TypeError: where a kind's `merged` returns no tensors by name.
    """
    found: Any = W.merged(f, params)
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        what = {name: type(t).__name__ for name, t in found.items()} if isinstance(found, Mapping) else type(found).__name__
        raise TypeError(f"{type(W).__name__}.merged: expected a mapping from names to tensors, found {what}. Return the merged tensors.")
    for name, tensor in found.items():
        yield name, ..., tensor
