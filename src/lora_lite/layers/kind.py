"""`Kind`: all that the framework asks about a kind of layer. Each kind is one subclass.

A variant sees the members of `Frozen`. The others say where such a layer is found, how the model's call of it reaches the variant, and how
it is merged, mixed and counted. Each method has a default that is right for a linear layer.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen, Params, in_dtype, plus
from lora_lite.core.legacy import gives_of
from lora_lite.core.tree import join

Run = Callable[[Frozen, Any], Any]
"""A variant with its params: `(W, x) -> y`."""
ADAPTERS = "_lora_lite_adapters"
"""The attribute of a module with children that lists the adapters whose params are registered on the module."""
ADOPTED = "_lora_lite_adopted"
"""The attribute that marks a layer of a private copy which runs its kind."""
HOST = "_lora_lite_host"
"""The attribute of a view that holds the module it is a view of."""


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
        each = torch.vmap(lambda p, x: self.apply(f, p, x), randomness="different")
        return each(params, x.unflatten(0, (rows, -1))).flatten(0, 1)

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
        weight, bias = (self.adapted(f, params, role, exact_dtype(self.dtype)) for role in ("weight", "bias"))
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
            adapted = self.adapted if W is self else functools.partial(_adapted_part, W)
            weight, bias = (adapted(f, leaves, role, torch.float64) for role in ("weight", "bias"))
            found.append((weight - W.dense(torch.float64), bias if W.bias is None else bias - W.bias.detach().double()))
        return found

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


class AtIdentity(Frozen):
    """A linear map that gives its own transpose at `points`, the rows of the identity, without a product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, constants: Params) -> None:
        super().__init__(weight, bias, constants)
        self._points: Tensor | None = None

    @property
    def points(self) -> Tensor:
        """The rows of the identity, `(i, i)`."""
        if self._points is None:
            self._points = torch.eye(self.in_features, dtype=self.dtype, device=self.device)
        return self._points

    def __call__(self, x: Tensor) -> Tensor:
        return plus(self.weight.t(), self.bias) if x is self._points else super().__call__(x)

    def matmul(self, x: Tensor) -> Tensor:
        return self.weight.t() if x is self._points else super().matmul(x)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        return A.t() if x is self._points else super().project(x, A, dropout)


def at_identity(f: Variant, params: Params, W: Frozen, role: str, dtype: torch.dtype | None) -> Tensor:
    """Return the `weight` `(o, i)` or the `bias` `(o,)` of a linear map with a variant on it, evaluated in `dtype`."""
    weight = W.dense(dtype)
    bias = W.bias.detach().to(weight.dtype) if role == "bias" and W.bias is not None else None
    at = AtIdentity(weight, bias, W.constants)
    offset = f(params, at, weight.new_zeros(1, W.in_features))[0]
    return offset if role == "bias" else (f(params, at, at.points) - offset).t()


def _adapted_part(W: Frozen, f: Variant, params: Params, role: str, dtype: torch.dtype) -> Tensor:
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


def of_rows(params: Params, index: Tensor | None) -> tuple[Params, int]:
    """Gather the params of each row of a batch. Return them with the number of rows or, without an index, of members."""
    if index is None:
        return params, next(iter(params.values())).shape[0]
    return {name: p.index_select(0, index) for name, p in params.items()}, index.shape[0]


def module_at(root: nn.Module, path: str) -> Any:
    """Return the module at a path that is known to lead to one; `get_submodule` checks each step, which takes longer than the step."""
    for name in path.split(".") if path else ():
        root = root._modules[name]  # type: ignore[assignment]
    return root


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module inside that holds a parameter, and the parameter's name there."""
    parent, _, own = name.rpartition(".")
    return module.get_submodule(parent), own


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def raw(layer: nn.Module) -> Any:
    """Return a view of a module whose attributes are its frozen tensors, even where the model reads adapted ones.

    The view shares the tables of parameters, buffers and submodules, so that tensors swapped in for a call are seen. It runs no hooks.
    """
    twin = type(layer).__new__(type(layer))
    vars(twin).update({name: value for name, value in vars(layer).items() if not isinstance(value, ReadTensor)})
    vars(twin).pop("forward", None)
    vars(twin)[HOST] = layer  # its mode may change
    return twin


class ReadTensor(Tensor):
    """A stand-in for an adapted parameter that the model reads. It has the parameter's shape and dtype. Each use sees the adapted tensor.

    The stand-in lies in the module's `__dict__`, which Python searches before the table of parameters. That table keeps the frozen tensor.
    """

    binding: Any
    of_parameter: str

    @classmethod
    def of(cls, binding: Any, name: str) -> "ReadTensor":
        """Make the stand-in for a parameter of a bound layer."""
        module, own = place_of(binding.W.layer, name)
        p: Any = module._parameters[own]
        whole = type(p.data) is Tensor  # else a part of a sharded weight, or a tensor of a class of its own
        like = p.detach() if whole else torch.empty((), dtype=p.dtype, device=p.device)
        return _stand_in(like, binding, name, tuple(p.shape), vars(p))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args = tuple(_adapted(a) for a in args)
        return func(*args, **{name: _adapted(a) for name, a in (kwargs or {}).items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReadTensor":
        with torch._C.DisableTorchFunctionSubclass():
            return _stand_in(self.detach(), copy.deepcopy(self.binding, memo), self.of_parameter, tuple(self.shape))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            like = torch.empty((), dtype=self.dtype, device=self.device)
            return _stand_in, (like, self.binding, self.of_parameter, tuple(self.shape))


_FACTS = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cuda", "is_cpu", "is_mps", "is_quantized")
)
"""The attributes that a stand-in answers from the frozen parameter."""


def _stand_in(like: Tensor, binding: Any, name: str, shape: tuple[int, ...], noted: Mapping[str, Any] = MappingProxyType({})) -> ReadTensor:
    self: ReadTensor = (like if like.shape == shape else like.expand(shape)).as_subclass(ReadTensor)
    vars(self).update(noted)  # what a library keeps on the parameter
    self.binding, self.of_parameter = binding, name
    return self


def _adapted(value: Any) -> Any:
    if isinstance(value, ReadTensor):
        return value.binding.read(value.of_parameter)
    if isinstance(value, list | tuple) and any(isinstance(v, ReadTensor) for v in value):
        return type(value)(_adapted(v) for v in value)
    return value
