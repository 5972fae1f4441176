"""`Kind`: all that the framework asks about a kind of layer. Each kind is one subclass.

A variant sees the members of `Frozen`. The others say where such a layer is found, how the model's call of it reaches the variant, and how
it is merged, mixed and counted. Each method has a default that is right for a linear layer.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen, Params, in_dtype
from lora_lite.core.invocation import ACTIVE, aligned
from lora_lite.core.legacy import gives_of
from lora_lite.core.tracing import vmap_rows
from lora_lite.core.tree import join
from lora_lite.layers.access import HOST, first_of, module_at, raw
from lora_lite.layers.identity import adapted_part, at_identity, exact_dtype, on_meta

Run = Callable[[Frozen, Any], Any]
"""A variant with its params: `(W, x) -> y`."""


class Variant:
    """A config's function as the kinds apply it: `(params, W, x) -> y`, params cast to the dtype of the call unless it casts itself."""

    def __init__(self, cfg: AdapterConfig) -> None:
        self.forward, self.uses, self.cast = cfg.forward, cfg.uses, cfg.cast

    def __call__(self, params: Params, W: Frozen, x: Any) -> Any:
        return self.forward(in_dtype(params, W, x) if self.cast else params, W, x)


class Kind(Frozen):
    """A kind of layer. A linear layer of your own needs a subclass with `fits`, no more.

    `build`, `load`, `find_targets` and `from_peft` take such classes as `kinds=(MyKind,)`. The first that fits a module reads it, before
    those that ship.

    Args:
        layer: the module. Its attributes are the frozen tensors, whatever is adapted.
        constants: the variant's frozen tensors, by name.

    Example:
        >>> import torch, lora_lite as ll
        >>> class MyLinear(torch.nn.Module):
        ...     def __init__(self, i, o):
        ...         super().__init__()
        ...         self.W, self.b = torch.nn.Parameter(torch.randn(i, o)), torch.nn.Parameter(torch.zeros(o))
        ...
        ...     def forward(self, x):
        ...         return x @ self.W + self.b
        >>> class MyKind(ll.Kind):
        ...     state = {"weight": "W", "bias": "b"}
        ...     weight = property(lambda self: self.layer.W.t())
        ...     bias = property(lambda self: self.layer.b)
        ...
        ...     @classmethod
        ...     def fits(cls, layer):
        ...         return isinstance(layer, MyLinear)
        ...
        ...     def to_weight(self, dense):
        ...         return dense.t()
        >>> adapt = ll.build(torch.nn.Sequential(MyLinear(4, 8)), ll.LoRAConfig(r=2), kinds=(MyKind,))
        >>> list(adapt.merge(adapt.init()))
        ['0.W', '0.b']
    """

    site: ClassVar[str] = "linear"
    """The site, `"linear"`, `"norm"`, `"module"` or `"block"`: variants whose fact `adapts` names it adapt this kind."""
    by_name: ClassVar[bool] = False
    """Whether only `target_names` can ask for such a layer."""
    gives: ClassVar[AbstractSet[str]] = Frozen.gives | {"inputs", "dropout"}
    """The parts that it offers to variants, matched with their `uses`. `"inputs"` allows calibration, `"dropout"` dropped inputs."""
    state: ClassVar[Mapping[str, str]] = {"weight": "weight", "bias": "bias"}
    """The names under which the module keeps its weight and its bias."""
    follow: Mapping[str, bool] | None = None
    """In a mixed batch, whether a tensor of `beside` has the batch's rows on its first axis or is shared; None where nobody has looked."""
    sees_inputs: ClassVar[bool] = True
    """Whether the variant is called with the layer's inputs. Where it is evaluated at the identity alone, it has to be linear."""
    by_product: ClassVar[bool] = False
    """Whether the layer keeps its own forward, whose product with the weight reaches the variant."""
    why: ClassVar[str] = ""
    """The reason why a part is lacking, in one sentence, for the error that refuses a variant."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if {"offers", "reads"} & set(vars(cls)):  # as version 0.1.0 said what `gives` says
            cls.gives = gives_of(vars(cls))

    def __init__(self, layer: Any, constants: Params | None = None) -> None:
        self.layer, self.constants = layer, {} if constants is None else dict(constants)

    # Where it is found

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether this kind reads a module."""
        raise NotImplementedError(f"{cls.__name__}.fits(layer) -> bool is not defined")

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        """Whether the forward of a module that fits computes the kind's map. By default `fits` is trusted."""
        return True

    @classmethod
    def fault(cls, layer: nn.Module) -> str | None:
        """Return the reason why a layer that fits cannot be read, with the way out. None for a layer that can."""
        return None

    @classmethod
    def places(cls, path: str, module: nn.Module, linear: Callable[[nn.Module], Any]) -> Iterator[str]:
        """Yield the paths of this kind's targets in the module at `path`. `linear(module)` tells linear layers."""
        if cls.fits(module):
            yield path

    @classmethod
    def host(cls, path: str) -> str:
        """Return the path of the module that a target at `path` belongs to, by default its own."""
        return path

    @classmethod
    def at(cls, model: nn.Module, path: str, constants: Params | None = None) -> Self:
        """Read the layer at `path` of a model."""
        return cls(raw(module_at(model, cls.host(path))), constants)

    @classmethod
    def holders(cls, path: str, shared: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Return the paths of other modules that share a weight with the target. `shared` lists them for each module."""
        return tuple(shared.get(path, ()))

    def sharer(self, module: nn.Module) -> "Kind | None":
        """Read another module that holds this layer's weight, so that a variant which is `tied` adapts it too. None where it cannot be."""
        return None

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        """Replace the forward of a layer in the private copy, target or not, where the layer's own would not do."""

    @classmethod
    def distribute(cls, layer: nn.Module, device: torch.device) -> None:
        """Prepare a layer of a private copy whose parameters and buffers are about to be split over processes.

        By default nothing is done. A kind whose weight is of a class of its own makes it a plain parameter, and copies to `device` what it
        holds besides parameters and buffers.
        """

    @classmethod
    def install(cls, clone: nn.Module, path: str) -> None:
        """Prepare the module around a target, in a copy of the model that is about to be bound."""

    # What a variant sees

    def own(self, role: str) -> Tensor | None:
        """Return the tensor that the module keeps as its `weight` or `bias`."""
        name = self.state.get(role)
        if name is None:
            return None
        table = self.layer._parameters
        return table[name] if name in table else getattr(self.layer, name, None)

    @property
    def weight(self) -> Tensor:
        weight = self.own("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__}: expected a weight at {self.state.get('weight')!r}, found none. Set its state.")
        return weight

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

    @property
    def active(self) -> Tensor | None:
        """The mask of the positions at which the variant acts, during a call; None for all."""
        own = vars(self).get("_active")
        return self.layer._buffers.get(ACTIVE) if own is None else own

    def with_active(self, active: Tensor) -> Self:
        """Return the same layer where the variant acts at other positions."""
        other = copy.copy(self)
        vars(other)["_active"] = active
        return other

    # How a call of the layer reaches the variant

    def bind(self, layer: nn.Module, binding: Any) -> None:
        """Make the model's call of the layer reach the target's binding."""
        vars(layer)["forward"] = binding

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a variant where the model calls the layer.

        Args:
            run: `(W, x) -> y`, the variant with its params.
            own: the layer's own forward.
            args, kwargs: the arguments of the model's call.
        """
        return run(self, first_of(args, kwargs))

    def frozen(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the layer without an adapter where the model calls it. `own` is the layer's own forward."""
        return own(*args, **kwargs)

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the vectors `(*b, i)` of a call for calibration."""
        x: Tensor = first_of(args, kwargs)
        return x

    def make(self, tree: Callable[[Frozen], Params]) -> dict[str, Tensor]:
        """Build a layer's params or constants by `tree`, which builds those of one linear map. Several maps are joined."""
        return dict(tree(self))

    def pairs(self, params: Params) -> Sequence[tuple[Frozen, Params]]:
        """Return each linear map of the layer with its params, in the order of `make`."""
        return [(self, params)]

    def apply(self, f: Variant, params: Params, x: Any) -> Any:
        """Apply a variant to the layer: to one map, or to each of several."""
        return f(params, self, x)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return a call's input, in which a mixed batch follows its rows: the first axis has one entry or several for each, in order."""
        return first_of(args, kwargs)

    def beside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the other tensors of a call that the layer is run with, by their places: none but for whole modules."""
        return {}

    def apply_rows(self, f: Variant, params: Params, x: Any, index: Tensor | None) -> Any:
        """Apply a variant to each row of a batch with the params of its own member.

        Args:
            f: the variant.
            params: a leading axis of members before that of each leaf.
            x: the layer's input; its first axis is a multiple of the batch's rows.
            index: the member of each row; None for equal contiguous groups.
        """
        params, rows = of_rows(params, index)
        if x.shape[0] % rows if rows else x.shape[0]:
            raise ValueError(
                f"expected an input with a multiple of {rows} rows, found shape {tuple(x.shape)}. The model regroups rows before this "
                "layer (routed experts do), so they cannot be followed; leave the layer out."
            )
        if not rows:  # vmap takes no empty axis
            params, rows = {name: p.new_zeros(1, *p.shape[1:]) for name, p in params.items()}, 1
        if (active := self.active) is not None:
            own = (x.unflatten(0, (rows, -1)), aligned(active, x).unflatten(0, (rows, -1)))
            return vmap_rows(lambda p, x, active: self.with_active(active).apply(f, p, x), params, *own).flatten(0, 1)
        found = vmap_rows(lambda p, x: self.apply(f, p, x), params, x.unflatten(0, (rows, -1)))
        return found.flatten(0, 1) if isinstance(found, Tensor) else pytree.tree_map(lambda y: y.flatten(0, 1), found)

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
        found = {self.state["weight"]: self.to_weight(weight)}
        if self.bias is not None:
            return {**found, self.state["bias"]: self.to_bias(bias)}
        if bias.any():
            raise ValueError("the adapter moves the bias, and the layer has none to hold it")
        return found

    def kept(self) -> dict[str, Tensor]:
        """Return the layer's tensors that `merged` replaces, under the same names. A packed weight is returned dense.

        Raises:
            ValueError: where no entry of a state dict holds the weight.
        """
        name = self.state["weight"]
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
        return (
            self.to_weight(tensor) if role == "weight" else self.to_bias(tensor)
        ).contiguous()  # in the layout of the frozen weight: products of another may round otherwise

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
        """Whether a call runs that has adapted tensors in the place of the module's own."""
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


def of_rows(params: Params, index: Tensor | None) -> tuple[Params, int]:
    """Gather the params of each row of a batch. Return them with the number of rows or, without an index, of members."""
    if index is None:
        return params, next(iter(params.values())).shape[0]
    return {name: p.index_select(0, index.to(p.device)) for name, p in params.items()}, index.shape[0]
