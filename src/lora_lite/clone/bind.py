"""Bind a target of a copy to its variant. The layer keeps its class, its `forward` is the binding, its params lie in a child of their own.

A call hands each binding the params of its target. In a module for tools that need one (`adapt.module`) they are the child's parameters.
Elsewhere the child has placeholders on meta, so that a stray read fails rather than computing silently without the adapter.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import several, tree_faults
from lora_lite.core.frozen import in_dtype
from lora_lite.core.plan import Shapes
from lora_lite.core.tree import AnyTree, Tree
from lora_lite.layers.kind import ADAPTERS, HOST, Kind, Params, ReadTensor, Variant, first_of, place_of, raw


class Adapter(nn.Module):
    """The params of one target as parameters of a module: a child of the layer that they adapt.

    Called, it is the adapted layer: what wraps modules with trainable parameters of their own (Opacus) finds them here. A module that has
    children may run through them, as `nn.Sequential` does: there the parameters are registered on the module itself, and nothing is added
    to its children.
    """

    names: dict[str, str]
    """The name of each param in `place`."""
    place: Any
    """The module on which the params are registered."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.binding, self.names = path, cast("Binding", None), {}  # tensors that targets share are bound to none
        vars(self)["place"] = self  # not a child
        self.alone = False  # a copy that some tool calls by itself, on the layer as it is

    @classmethod
    def on(cls, host: nn.Module, path: str, named: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> "Adapter":
        """Register placeholders for the params of the target at `path` on a module of a copy.

        Names begin with `named` where several adapters meet on one module."""
        self = cls(path)
        leaf = not any(not isinstance(child, Adapter) for child in host._modules.values()) and not isinstance(host, _CONTAINERS)
        if leaf:
            host.add_module(_free_name(host, named), self)
        else:
            vars(self)["place"] = host
            vars(host).setdefault(ADAPTERS, []).append(self)
        for name, shape in shapes.items():
            own = name.replace(".", "/")  # no parameter's name has a dot
            self.names[name] = _free_name(self, own) if leaf else _free_name(host, f"{named}_{own}")
            placeholder = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
            self.place.register_parameter(self.names[name], placeholder)
        return self

    @property
    def parameters_by_name(self) -> dict[str, Tensor | None]:
        """The parameters, by the names that the variant has for them."""
        table = self.place._parameters
        return {name: table.get(own) for name, own in self.names.items()}

    def params(self) -> Params:
        """Return the parameters as params."""
        place = self.place
        table = place._parameters
        return {name: table[own] if own in table else getattr(place, own) for name, own in self.names.items()}

    def fill(self, leaves: Mapping[str, Tensor]) -> None:
        """Make copies of a target's params the parameters, to be trained."""
        for name, own in self.names.items():
            self.place.register_parameter(own, nn.Parameter(leaves[name].detach().clone()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.binding.run(args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(value, "_local_tensor") and name in vars(self).get("_parameters", ()) and self.binding is not None:
            hide_reads(self.binding.root)  # FSDP2 takes the params, and will look for the layers' own
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.binding is not None and not self.alone:
            constants = {name: fn(c) for name, c in self.binding.W.constants.items()}
            for binding in (self.binding, *self.binding.followers):
                binding.W.constants = constants
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        by_itself = self.binding is not None and id(vars(self.binding.W.layer)[HOST]) not in memo
        if by_itself and self.binding.followers:
            raise ValueError(
                f'adapt.module: expected a tool that runs the adapter of "{self.path}" by itself, as Opacus does, to see all that its '
                "params do, found modules with the same weight, such as a tied head, which take them too. Use ll.per_example_grad, or give "
                "the head a weight of its own."
            )
        return self.twin() if by_itself else _deep(self, memo)  # as Opacus copies it: it goes on adapting the same layer

    def twin(self) -> "Adapter":
        """Return an adapter with copies of the parameters, of the same layer."""
        other = Adapter(self.path)
        other.names = dict(self.names)
        for name, p in self._parameters.items():
            other.register_parameter(name, None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad))
        other.binding, other.alone = self.binding.with_adapter(other), True
        return other


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _deep(adapter: Adapter, memo: dict[int, Any]) -> Adapter:
    other = Adapter.__new__(Adapter)
    memo[id(adapter)] = other
    vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(adapter).items()})
    return other


def _free_name(module: nn.Module, name: str) -> str:
    while hasattr(module, name):  # names of ours never meet the user's
        name += "_"
    return name


class Binding:
    """A target of a copy: its layer, its variant, and the params of the call that runs.

    Attributes:
        path: the target's path in the model.
        cfg: its variant.
        W: its layer, with the variant's constants.
        adapter: where the params lie as parameters of a module.
        own: the forward that the layer had.
        params: those of the call that runs; None outside of one, where the adapter's own parameters stand.
        off: whether the call that runs is one of the frozen model.
        mixed: whether `params` have a leading axis of members.
        index: the member of each row of a mixed batch; None for equal contiguous groups.
        used: whether a call has reached the target.
        followers: the bindings of other modules with the target's weight, where the variant is tied.
        rows: of the mixed batch, where the target's input is not known to follow them; None where it is.
        watch: sees the inputs of a call of the frozen model, where one is tried.
    """

    def __init__(self, path: str, cfg: AdapterConfig, W: Kind, adapter: Adapter, shared: Adapter | None = None) -> None:
        self.path, self.cfg, self.W, self.adapter, self.shared = path, cfg, W, adapter, shared
        self.own: Callable[..., Any] = _missing
        self.root: nn.Module = adapter
        self.variant, self.forward = Variant(cfg), cfg.forward
        self.direct = type(W).call is Kind.call and type(W).apply is Kind.apply  # what stands between the call and the formula is nothing
        self.params: Params | None = None
        self.mixed = False
        self.index: Tensor | None = None
        self.followers: list[Follower] = []
        self.used = self.fast = self.off = self._placed = False
        self.rows: int | None = None
        self.watch: Callable[[Any], Any] | None = None

    def with_adapter(self, adapter: Adapter) -> "Binding":
        """Return the same binding with its params in another adapter."""
        other = Binding(self.path, self.cfg, self.W, adapter, self.shared)
        other.own, other.root, other.followers = self.own, self.root, self.followers
        return other

    def reread(self) -> None:
        """Read the layer anew, after its packed weight has moved."""
        layer = vars(self.W.layer)[HOST]
        self.W = type(self.W)(raw(layer), self.W.constants)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the variant where the model calls the layer: one step from there to its formula, where nothing stands between."""
        if not self.fast:
            return self._call(args, kwargs)
        try:
            params, W, x = self.params, self.W, args[0] if args else first_of(args, kwargs)
            if not torch.compiler.is_compiling():  # which would compile again where this differs, and allows no writing in a checkpoint
                self.used = True
            for p in params.values():  # type: ignore[union-attr]  # as in_dtype does, without its call
                if p.dtype is not x.dtype:
                    params = in_dtype(params, W, x)  # type: ignore[arg-type]
                    break
            return self.forward(params, W, x)  # type: ignore[arg-type]
        except Exception as e:
            e.add_note(f'in {type(self.cfg).__name__} at target "{self.path}"')
            raise

    @property
    def standing(self) -> tuple[Params | None, bool, Tensor | None, bool]:
        """The arguments that `set` put in place."""
        return self.params, self.mixed, self.index, self.off

    def set(self, params: Params | None, mixed: bool = False, index: Tensor | None = None, off: bool = False) -> None:
        """Put the params of a call in place, or what stood there for the call around it; without arguments nothing stands."""
        self.params, self.mixed, self.index, self.off = params, mixed, index, off
        self.fast = self.direct and not mixed and params is not None

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.params is None and not self.off and self.adapter.place is self.adapter:  # in a module: its hooks may be those of a tool
            return self.adapter(*args, **kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the variant on a call's arguments, whatever kind of layer and of call it is."""
        try:
            W = self.W
            if self.off:
                if self.watch is not None:
                    self.watch(W.given(args, kwargs))
                return W(first_of(args, kwargs)) if self.direct else W.frozen(self.own, args, kwargs)
            params = self.registered() if self.params is None else self.params
            self._note()
            if self.mixed and self.rows is not None:
                self._require_rows(W.given(args, kwargs), self.rows)
            return W.call(functools.partial(self._apply, params), self.own, args, kwargs)
        except Exception as e:
            e.add_note(f'in {type(self.cfg).__name__} at target "{self.path}"')
            raise

    def _require_rows(self, x: Any, rows: int) -> None:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != rows:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f'adapt.mixed: at "{self.path}" expected an input with a multiple of {rows} rows whose order is known, found {found}. '
                "Leave the layer out with exclude_names, or run the members one by one. An index has a number for each row of the batch."
            )

    def _apply(self, params: Params, W: Any, x: Any) -> Any:
        if not self.mixed:
            return W.apply(self.variant, params, x)
        try:
            return W.apply_rows(self.variant, params, x, self.index)
        except ValueError as e:
            raise ValueError(f'adapt.mixed: at "{self.path}" {e}') from e

    def read(self, name: str) -> Tensor:
        """Return a parameter of the layer as its reader in the model should find it."""
        W = self.W
        if self.off or (self.params is None and self._hollow()):
            module, own = place_of(W.layer, name)
            tensor: Tensor = module._parameters[own]  # type: ignore[assignment]
            return tensor
        params = self.registered() if self.params is None else self.params
        self._note()
        self._require_place(name)
        if self.mixed and not self.W.moving:
            raise ValueError(
                f'adapt.mixed: at "{self.path}" expected a target that is called with rows of the batch, found a weight that the module '
                "around it reads: all rows see the same one. Leave it out, or run the members one by one."
            )
        if getattr(self.cfg, "dropout", 0.0) and W.training:
            raise ValueError(
                f'adapt: at "{self.path}" expected a target that is called with an input, found a weight that the module around it reads, '
                f"where {type(self.cfg).__name__} has no input to drop. Set its dropout to 0, or leave the layer out."
            )
        return W.read(self.variant, params, name)

    def _note(self) -> None:
        if not torch.compiler.is_compiling():
            self.used = True

    def _require_place(self, name: str) -> None:
        """Refuse a variant that moves the bias of a layer without one, whose weight is read: nothing could hold the shift."""
        if torch.compiler.is_compiling() or self._placed:
            return
        shapes = {n: tuple(p.shape) for n, p in self._leaves()}
        if self.W.shifts(self.variant, shapes):
            raise ValueError(
                f'adapt: at "{self.path}" expected a variant that changes the weight alone, since the model reads {name!r} and the layer '
                f"has no bias, found {type(self.cfg).__name__}, which adds to its output. Leave the layer out with exclude_names."
            )
        self._placed = True

    def _leaves(self) -> list[tuple[str, Tensor]]:
        """Return the adapter's parameters by name, shared ones among them."""
        own = [*self.adapter.parameters_by_name.items(), *(self.shared.parameters_by_name.items() if self.shared is not None else ())]
        return [(name, p) for name, p in own if p is not None]

    def _hollow(self) -> bool:
        return any(p is not None and p.is_meta for p in self.adapter.parameters_by_name.values()) and not self._on_meta()

    def _on_meta(self) -> bool:
        return self.W.device.type == "meta"

    def registered(self) -> Params:
        """Return the adapter's parameters as params. Placeholders are refused, since products on a CPU accept them in silence."""
        if self._hollow():
            raise RuntimeError(
                f'adapt: expected params with data at "{self.path}", found them on meta. Pass params on its device; where the model '
                "recomputes blocks by a checkpoint of its own, leave that to build(..., remat=) instead."
            )
        found = self.adapter.params()
        return found if self.shared is None else {**self.shared.params(), **found}


class Follower(Binding):
    """Another module with a target's weight, such as a tied head: it runs the variant on its own reading of it, with the same params.

    Args:
        leader: the target's binding.
        W: the module, as the target's kind reads it.
    """

    def __init__(self, leader: Binding, W: Kind) -> None:
        super().__init__(leader.path, leader.cfg, W, leader.adapter, leader.shared)
        self.leader, self.root = leader, leader.root

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self.run(args, kwargs)  # the adapter's own call is that of the target

    def read(self, name: str) -> Tensor:
        return self.leader.read("weight")


def _missing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("expected a forward of the layer's own, found none")


def bind_target(
    clone: nn.Module, path: str, kind: type[Kind], cfg: AdapterConfig, shapes: Mapping[str, tuple[int, ...]], constants: Params, shared: Any
) -> Binding:
    """Bind one target of a copy: register its adapter, replace the layer's forward, put stand-ins before weights that the model reads."""
    host = clone.get_submodule(kind.host(path))
    W = kind.at(clone, path, dict(constants))
    inside = path[len(kind.host(path)) :].lstrip(".")
    adapter = Adapter.on(host, path, f"{inside}_adapter" if inside else "adapter", shapes, cfg.dtype)
    binding = adapter.binding = Binding(path, cfg, W, adapter, shared)
    binding.own = vars(host).get("forward") or functools.partial(type(host).forward, host)
    W.bind(host, binding)
    binding.root = clone
    return binding


_FOLLOWER = "_lora_lite_follower"


def bind_followers(clone: nn.Module, binding: Binding, paths: Sequence[str]) -> list[Follower]:
    """Bind the modules of a copy that share the weight of a bound target."""
    for path in paths:
        module = clone.get_submodule(path)
        W: Any = binding.W.sharer(module)  # whose kind has one: this is checked before a copy is made
        follower = Follower(binding, W)
        follower.own = vars(module).get("forward") or functools.partial(type(module).forward, module)
        W.bind(module, follower)
        vars(module)[_FOLLOWER] = follower
        binding.followers.append(follower)
    return binding.followers


def show_reads(root: nn.Module) -> None:
    """Let whoever reads a parameter of a bound copy find the adapted one."""
    for binding, module, own, name in _reads(root):
        vars(module)[own] = ReadTensor.of(binding, name)


def hide_reads(root: nn.Module) -> None:
    """Let whoever reads a parameter find the frozen one until the first call: FSDP2 looks for it when that begins."""
    if _HIDDEN in vars(root):
        return
    for _, module, own, _ in _reads(root):
        vars(module).pop(own, None)
    vars(root)[_HIDDEN] = root.register_forward_pre_hook(_show_again)  # FSDP2 puts its own hook before


def _reads(root: nn.Module) -> Iterator[tuple[Binding, nn.Module, str, str]]:
    """Yield each parameter that is adapted where the model reads it: its binding, the module, its name there and in the target."""
    for leader in bindings(root).values():
        for binding in (leader, *leader.followers):
            for name in leader.W.readable():
                module, own = place_of(vars(binding.W.layer)[HOST], name)
                yield binding, module, own, name


def _show_again(root: nn.Module, args: Any) -> None:
    vars(root).pop(_HIDDEN).remove()
    show_reads(root)


_HIDDEN = "_lora_lite_hidden"


def adapters(module: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters of a bound copy."""
    for inner in module.modules():
        if isinstance(inner, Adapter):
            yield inner
        yield from vars(inner).get(ADAPTERS, ())


def placeholders(module: nn.Module) -> set[Any]:
    """Return the parameters of a bound copy that are adapters'."""
    return {p for adapter in adapters(module) for p in adapter.parameters_by_name.values() if p is not None}


def bindings(module: nn.Module) -> dict[str, Binding]:
    """Return the bindings of a bound copy by the path of their target."""
    return {a.binding.path: a.binding for a in adapters(module) if a.binding is not None}


def bindings_inside(block: nn.Module) -> list[Binding]:
    """List the bindings whose modules lie in a part of a bound copy, with those of modules that follow a target elsewhere."""
    followers = [vars(module)[_FOLLOWER] for module in block.modules() if _FOLLOWER in vars(module)]
    return [*(a.binding for a in adapters(block) if a.binding is not None), *followers]


def require_fit(params: Any, shapes: Shapes, caller: str, on_meta: bool = False) -> None:
    """Refuse a params tree of other paths, names or shapes, or without data where the model has some.

    Raises:
        ValueError: it lists each departure.
        RuntimeError: for params on meta, which products on a CPU take without a word.
    """
    try:
        if fits(params, shapes):
            return
    except (KeyError, TypeError, AttributeError):
        pass  # whatever is wrong is found again below, and named
    faults = tree_faults(params, shapes)
    if not faults:
        empty = next(path for path, leaves in params.items() for leaf in leaves.values() if leaf.is_meta)
        if on_meta:
            return
        raise RuntimeError(
            f'{caller}: expected params with data at "{empty}", found them on meta. Pass params on its device; where the model recomputes '
            "blocks by a checkpoint of its own, leave that to build(..., remat=) instead."
        )
    raise ValueError(
        f"{caller}: expected params that fit this model and config, found:\n{several(faults)}\n"
        "Use adapt.init(...), or load(...) with the file that the params were saved to."
    )


def fits(params: AnyTree, shapes: Shapes) -> bool:
    """Whether a params tree has these paths, names and shapes, and data. Plain loops: every call passes here, with hundreds of targets."""
    if len(params) != len(shapes):
        return False
    for path, expected in shapes.items():
        leaves = params[path]
        if len(leaves) != len(expected):
            return False
        for name, shape in expected.items():
            leaf = leaves[name]
            if leaf.shape != shape or not leaf.is_floating_point() or leaf.is_meta:
                return False
    return True


def read_params(module: nn.Module, shapes: Shapes, get: Callable[[Tensor], Tensor]) -> Tree:
    """Read a params tree out of a bound module.

    Raises:
        AttributeError: where the module lacks a target's params.
    """
    held = params_in(module)
    for path in shapes:
        if path not in held:
            raise AttributeError(f"no adapter of {path!r}")
    return {path: {name: get(held[path][name]) for name in names} for path, names in shapes.items()}


@torch.no_grad()
def write_params(module: nn.Module, params: AnyTree) -> None:
    """Write the values of a params tree into a bound module, in place."""
    held = params_in(bare(module))
    for path, leaves in params.items():
        for name, leaf in leaves.items():
            held[path][name].copy_(leaf)


def params_in(module: nn.Module) -> dict[str, Params]:
    """Return the parameters of a bound module's adapters as a params tree."""
    return {adapter.path: adapter.params() for adapter in adapters(module)}


def bare(module: nn.Module) -> nn.Module:
    """Take off the wrappers of DDP, DataParallel and `torch.compile`."""
    while True:
        wrapper = "module" if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel) else "_orig_mod"
        inner = getattr(module, wrapper, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def whole(param: Tensor) -> Tensor:
    """Copy a param out of a module. A param that FSDP2 has split is gathered, by all processes together."""
    param = param.detach()
    return param.full_tensor() if hasattr(param, "full_tensor") else param.clone()
