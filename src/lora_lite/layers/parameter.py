"""A bare parameter of a module: attention's packed projection, a matrix in a `ParameterList`, a stack of matrices `(n, o, i)`.

Nobody calls such a weight with an input. Wherever the model reads it, it finds the adapted one: `f(I)`, the variant's function at the
identity, `W^T + scale (B A)^T` for LoRA.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_lite.core.frozen import Frozen
from lora_lite.core.tree import join
from lora_lite.layers.access import module_at, raw
from lora_lite.layers.identity import Release, at_identity, columns, exact_dtype, offset_of, on_meta
from lora_lite.layers.kind import Kind, Params, Variant
from lora_lite.layers.linear import keeps_codes
from lora_lite.layers.tensors import Part

UNREAD = (nn.RNNBase,)
"""Classes that reach their parameters by a list of their own, not by attributes, so that a stand-in would not be read."""


class ParameterKind(Kind):
    """A matrix `(o, i)`, or several `(n, o, i)`, whose params and constants are stacked along a first axis."""

    by_name: ClassVar[bool] = True
    gives: ClassVar[AbstractSet[str]] = Frozen.gives - {"positions"}
    sees_inputs: ClassVar[bool] = False
    takes_shifts: ClassVar[bool] = False
    why: ClassVar[str] = "The module around this weight reads it and never calls it with an input."

    def __init__(self, layer: Any, constants: Params | None = None, name: str = "weight") -> None:
        super().__init__(layer, constants)
        self.state = {"weight": name, "bias": f"{name}_bias"}  # type: ignore[misc]  # each has a name of its own
        self.transposed = bool(getattr(layer, "is_transposed", False))

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return False  # it reads parts of modules

    @classmethod
    def places(cls, path: str, module: nn.Module, linear: Callable[[nn.Module], Any]) -> Iterator[str]:
        if isinstance(module, UNREAD) or keeps_codes(module._parameters):  # scales beside codes are no map of their own
            return
        for name, p in module._parameters.items():
            if p is not None and p.dim() in (2, 3) and p.is_floating_point() and not name.endswith("bias"):
                yield join(path, name)

    @classmethod
    def host(cls, path: str) -> str:
        return path.rpartition(".")[0]

    @classmethod
    def at(cls, model: nn.Module, path: str, constants: Params | None = None) -> Self:
        return cls(raw(module_at(model, cls.host(path))), constants, path.rpartition(".")[2])

    def bind(self, layer: nn.Module, binding: Any) -> None:
        """Leave the module's own forward: it reads the weight."""

    @property
    def stacked(self) -> bool:
        """Whether the parameter is a stack of matrices."""
        return self.own("weight").dim() == 3  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:
        weight: Any = self.own("weight")
        return weight.mT if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return None  # a bias of the module is no part of the target

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def parts(self) -> Sequence[Frozen]:
        """The linear maps of the parameter: one, or each of a stack."""
        if not self.stacked:
            return (self.one(self.weight, self.bias, self.constants),)
        constants = {name: c.unbind(0) for name, c in self.constants.items()}
        biases = [None] * len(self.weight) if self.bias is None else self.bias.unbind(0)
        weights = self.weight.unbind(0)
        return [self.one(w, b, {name: c[n] for name, c in constants.items()}) for n, (w, b) in enumerate(zip(weights, biases))]

    def one(self, weight: Tensor, bias: Tensor | None, constants: Params) -> Frozen:
        """Return one linear map."""
        return Frozen(weight, bias, constants, self.training)

    def split(self, params: Params) -> Sequence[Params]:
        """Return the params of each part."""
        if not self.stacked:
            return (params,)
        each = {name: p.unbind(0) for name, p in params.items()}
        return [{name: p[n] for name, p in each.items()} for n in range(len(self.weight))]

    def make(self, tree: Callable[[Frozen], Params]) -> dict[str, Tensor]:
        trees = [tree(part) for part in self.parts]
        return {name: self._joined([t[name] for t in trees]) for name in trees[0]}

    def pairs(self, params: Params) -> Sequence[tuple[Frozen, Params]]:
        return list(zip(self.parts, self.split(params)))

    def _joined(self, results: Sequence[Tensor]) -> Tensor:
        return torch.stack(tuple(results)) if self.stacked else results[0]

    def part(self, tree: Params, name: str) -> Params:
        return self.split(tree)[0]

    def adapted(self, f: Variant, params: Params, role: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._joined([at_identity(f, p, W, role, dtype) for W, p in self.pairs(params)])

    def merged_parts(self, f: Variant, params: Params, release: Release = lambda: None) -> Iterator[Part]:
        dtype = exact_dtype(self.dtype)
        beside = self._with_bias(self._joined([offset_of(f, p, W, dtype, release) for W, p in self.pairs(params)]))
        for n, (W, p) in enumerate(self.pairs(params)):
            for where, part in columns(f, p, W, dtype, release):
                index = (where, slice(None)) if self.transposed else (slice(None), where)
                yield self.state["weight"], (n, *index) if self.stacked else index, part.t() if self.transposed else part
        for name, tensor in beside.items():
            yield name, ..., tensor

    def readable(self) -> list[str]:
        name = self.state["weight"]
        return [name] if name in self.layer._parameters else []  # experts may compute theirs, and run a forward of the library's

    def probe(self, tokens: int) -> list[tuple[str, Frozen, Tensor, int]]:
        return [("", *on_meta(self.parts[0], tokens))]  # a token passes through one of them

    def to_weight(self, dense: Tensor) -> Tensor:
        return dense.mT if self.transposed else dense
