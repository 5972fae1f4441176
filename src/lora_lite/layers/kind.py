"""`Kind`: all that the framework asks about a kind of layer. Each kind is one subclass.

A variant sees the members of `Frozen`. The others say where such a layer is found, how the model's call of it reaches the variant, and how
it is merged, mixed and counted. Each method has a default that is right for a linear layer.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_lite.core.frozen import Frozen, Params
from lora_lite.core.invocation import ACTIVE, aligned
from lora_lite.core.legacy import gives_of
from lora_lite.core.tracing import vmap_rows
from lora_lite.layers.access import first_of, module_at, raw
from lora_lite.layers.tensors import Tensors
from lora_lite.layers.tensors import Variant as Variant

Run = Callable[[Frozen, Any], Any]
"""A variant with its params: `(W, x) -> y`."""


class Kind(Tensors):
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
        ...     classes = (MyLinear,)
        ...     state = {"weight": "W", "bias": "b"}
        ...     weight = property(lambda self: self.layer.W.t())
        ...     bias = property(lambda self: self.layer.b)
        ...
        ...     def to_weight(self, dense):
        ...         return dense.t()
        >>> adapt = ll.build(torch.nn.Sequential(MyLinear(4, 8)), ll.LoRAConfig(r=2), kinds=(MyKind,))
        >>> list(adapt.merge(adapt.init()))
        ['0.W', '0.b']
    """

    site: ClassVar[str] = "linear"
    """The site, `"linear"`, `"norm"`, `"module"` or `"block"`: variants whose fact `adapts` names it adapt this kind."""
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The classes of its layers, subclasses included; empty where `fits` tells them."""
    by_name: ClassVar[bool] = False
    """Whether only `target_names` can ask for such a layer."""
    gives: ClassVar[AbstractSet[str]] = Frozen.gives | {"inputs", "dropout"}
    """The parts that it offers to variants, matched with their `uses`. `"inputs"` allows calibration, `"dropout"` every dropout."""
    follow: Mapping[str, int] | None = None
    """In a mixed batch, the entries of a tensor of `beside` that all rows share, 0 where it has the rows; None where nobody has looked."""
    count: int | None = None
    """The rows of the mixed batch that runs; None where they are not followed."""
    sees_inputs: ClassVar[bool] = True
    """Whether the variant is called with the layer's inputs. Where it is evaluated at the identity alone, it has to be linear."""
    takes_shifts: ClassVar[bool] = True
    """Whether a variant may add to the output: not where the model reads the weight in place of calling the layer."""
    keeps_forward: ClassVar[bool] = False
    """Whether the layer keeps its own forward, which finds the adapted weight."""
    tries: bool = False
    """Whether such a forward runs that runs again if it hands the weight to an autograd Function."""
    by_product: ClassVar[bool] = False
    """Whether the product with the weight in such a forward reaches the variant."""
    why: ClassVar[str] = ""
    """The reason why a part is lacking, in one sentence, for the error that refuses a variant."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if {"offers", "reads"} & set(vars(cls)):  # as version 0.1.0 said what `gives` says
            cls.gives = gives_of(vars(cls))

    # Where it is found

    @classmethod
    def may_fit(cls, of: type[nn.Module]) -> bool:
        """Whether modules of a class can be of this kind. A kind that ships is asked once for each class, `fits` for each module."""
        return not cls.classes or issubclass(of, cls.classes)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether this kind reads a module: by default wherever `may_fit` says so of its class."""
        told = cls.classes or cls.may_fit.__func__ is not Kind.may_fit.__func__  # type: ignore[attr-defined]  # mypy takes these for functions
        if not told:
            raise NotImplementedError(f"{cls.__name__}.classes is not set, and {cls.__name__}.fits(layer) -> bool is not defined")
        return cls.may_fit(type(layer))

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

    # Where the variant acts

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
        vars(layer)["forward"] = binding.__call__  # a bound method, which is quicker to call than the object

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a variant where the model calls the layer.

        Args:
            run: `(W, x) -> y`, the variant with its params.
            own: the layer's own forward.
            args, kwargs: the arguments of the model's call.

        Raises:
            ValueError: for a call with more than one argument, which a kind with a `call` of its own can hand on.
        """
        if len(args) + len(kwargs) > 1:
            raise ValueError(
                f"{type(self).__name__}: expected the model to call the layer with one argument, found {len(args) + len(kwargs)}, of "
                "which the variant would see the first alone. Define call(self, run, own, args, kwargs) in the kind, or leave the layer "
                "out with exclude_names."
            )
        return run(self, first_of(args, kwargs))

    def frozen(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the layer without an adapter where the model calls it. `own` is the layer's own forward."""
        return own(*args, **kwargs)

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the vectors `(*b, i)` of a call for calibration."""
        x: Tensor = first_of(args, kwargs)
        return x

    def apply(self, f: Variant, params: Params, x: Any) -> Any:
        """Apply a variant to the layer: to one map, or to each of several."""
        return f(params, self, x)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return a call's input, in which a mixed batch follows its rows: the first axis has one entry or several for each, in order."""
        return first_of(args, kwargs)

    def beside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the other tensors of a call that the layer is run with, by their places: none but for whole modules."""
        return {}

    def results(self, y: Any) -> dict[str, Tensor]:
        """Return the tensors of a call's result in which a mixed batch has its rows first, by their places: none but for whole modules.

        A linear layer's result has the rows where its input has them."""
        return {}

    def apply_rows_at(self, axis: int, f: Variant, params: Params, x: Tensor, index: Tensor | None) -> Any:
        """Apply a variant to each row as `apply_rows` does, where another axis than the first has the rows. So has that of the result."""
        if axis >= x.dim():
            raise ValueError(f"expected row_map to give an axis of an input of shape {tuple(x.shape)}, found {axis}. Count from 0.")
        return self.apply_rows(f, params, x.movedim(axis, 0), index).movedim(0, axis)

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
        return _joined(found) if isinstance(found, Tensor) else pytree.tree_map_only(Tensor, _joined, found)


def _joined(y: Tensor) -> Tensor:
    """Join the entries of all rows on one axis."""
    if y.dim() < 2:
        raise ValueError(
            "expected a module whose outputs have the batch's rows on their first axis, found a number for each row. Train a part of it "
            "that returns rows, or run the members one by one."
        )
    return y.flatten(0, 1)


def of_rows(params: Params, index: Tensor | None) -> tuple[Params, int]:
    """Gather the params of each row of a batch. Return them with the number of rows or, without an index, of members."""
    if index is None:
        return params, next(iter(params.values())).shape[0]
    return {name: p.index_select(0, index.to(p.device)) for name, p in params.items()}, index.shape[0]
