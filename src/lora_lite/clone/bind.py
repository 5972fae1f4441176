"""Bind a target of a copy to its variant. The layer keeps its class, its `forward` is the binding, its params lie in a child of their own.

A call hands each binding the params of its target. In a module for tools that need one (`adapt.module`) they are the child's parameters.
Elsewhere the child has placeholders on meta, so that a stray read fails rather than computing silently without the adapter.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.adapter import Adapter, Shared
from lora_lite.clone.first import First
from lora_lite.clone.reads import forget_traced, hide_reads, key_of, note_traced, noted
from lora_lite.clone.rows import Rows
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import in_dtype
from lora_lite.layers.access import HOST, first_of, place_of, raw, takes_one
from lora_lite.layers.kind import Kind, Params, Variant

_NOTHING: Any = object()  # no positional argument


class Uniform:
    """The facts of the call that runs, for all bindings of a copy: the params' dtype if they have one, and whether autograd records it."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self.graded = False


class Binding:
    """A target of a copy: its layer, its variant, and the params of the call that runs.

    Attributes:
        path: the target's path in the model.
        cfg: its variant.
        W: its layer, with the variant's constants.
        adapter: where the params lie as parameters of a module.
        shared: of params that the target shares with others, by its own names, the adapter in which they lie and the name there.
        key: a name of the binding that the compiler takes for a constant.
        own: the forward that the layer had.
        params: those of the call that runs; None outside of one, where the adapter's own parameters stand.
        off: whether the call that runs is one of the frozen model.
        uniform: the dtype of all targets' params in the call that runs, and whether autograd records it.
        rows: of a mixed batch, in which `params` have a leading axis of members; None for other calls.
        index: the member of each row of a mixed batch; None for equal contiguous groups.
        used: whether a call has reached the target.
        fast: whether a call with `params` goes straight to the formula; "first" where none has yet reached the target, and it is noted.
            Not while a compiler traces: it would compile again after the first call.
        followers: the bindings of other modules with the target's weight, where the variant is tied.
        seen: the frozen parameters that the model has read adapted since the target was last called, by name: what it made of them must
            not come back as the layer's own.
        watch: sees the inputs of a call of the frozen model and the tensors beside them, where one is tried.
    """

    def __init__(self, path: str, cfg: AdapterConfig, W: Kind, adapter: Adapter, shared: Shared = ()) -> None:
        self.path, self.cfg, self.adapter, self.shared = path, cfg, adapter, dict(shared)
        self.key = key_of(path)
        self.W = _cast_for(W)
        self.own: Callable[..., Any] = _missing
        self.root: nn.Module = adapter
        self.variant = Variant(cfg)
        # Nothing stands between the call and the formula, but the dtype of the params.
        self.direct = cfg.cast and type(W).call is Kind.call and type(W).apply is Kind.apply and takes_one(W.layer)
        self.params: Params | None = None
        self.uniform = Uniform()
        self.rows: Rows | None = None
        self.index: Tensor | None = None
        self.followers: list[Binding] = []
        self.seen: dict[str, Tensor | None] = {}
        self.used = self.off = self._placed = False
        self.fast: bool | str = "first" if self.direct else False
        self.watch: Callable[[Any, Mapping[str, Tensor]], Callable[[Mapping[str, Tensor]], None]] | None = None

    def with_adapter(self, adapter: Adapter) -> "Binding":
        """Return the same binding with its params in another adapter."""
        other = Binding(self.path, self.cfg, self.W, adapter, self.shared)
        other.own, other.root, other.followers = self.own, self.root, self.followers
        other.index, other.rows = self.index, self.rows
        return other

    def forget_traced(self) -> None:
        """Begin a trace, in which the model has read nothing yet."""
        forget_traced(self.key)

    def hide_reads(self) -> None:
        """Hide the stand-ins of the whole copy, as `hide_reads` does."""
        hide_reads(self.root)

    def reread(self) -> None:
        """Read the layer anew, after its packed weight has moved."""
        layer = vars(self.W.layer)[HOST]
        self.W = _cast_for(type(self.W)(raw(layer), self.W.constants))

    def __call__(self, x: Any = _NOTHING, *args: Any, **kwargs: Any) -> Any:
        """Run the variant where the model calls the layer: one step from there to its formula, where nothing stands between."""
        params = self.params
        if params is None or self.fast is not True or x is _NOTHING:
            args = args if x is _NOTHING else (x, *args)
            if params is None or not self.fast:
                return self._call(args, kwargs)
            x = first_of(args, kwargs)
            if not self.used and not torch.compiler.is_compiling():
                return self._first(x)
            self._require_own()
            if self.used:  # else it is traced: a branch of torch.cond may change nothing
                self.fast = True
        try:
            W = self.W
            if x.dtype is not self.uniform.dtype:
                params = in_dtype(params, W, x)
            return self.cfg.forward(params, W, x)
        except Exception as e:
            self._name(e)
            raise

    def _first(self, x: Any) -> Any:
        """Run a call that is the first to reach the target. A variant of the user's own may be wrong in a way that no later one shows."""
        first = First(self.path, self.cfg, self.W, x)
        try:
            y = self.run((x,), {})
            first.require(y)
        except BaseException:
            self.used = False  # the next one is looked at
            raise
        self.fast = True
        return y

    def _name(self, e: Exception) -> None:
        """Note on an error the target, and params in a layout that few operators take."""
        if torch.compiler.is_compiling():  # which knows no notes: it would name them in the place of the error
            return
        e.add_note(f'in {type(self.cfg).__name__} at target "{self.path}"')
        if any(p.layout is not torch.strided for p in (self.params or {}).values()):
            e.add_note("its params are sparse: pass dense ones, leaf.to_dense()")

    @property
    def standing(self) -> tuple[Params | None, Rows | None, Tensor | None, bool]:
        """The arguments that `set` put in place."""
        return self.params, self.rows, self.index, self.off

    def set(self, params: Params | None, rows: Rows | None = None, index: Tensor | None = None, off: bool = False) -> None:
        """Put the params of a call in place, or what stood there for the call around it; without arguments nothing stands."""
        self.params, self.rows, self.index, self.off = params, rows, index, off
        if rows is not None:
            self.W.follow, self.W.count = rows.beside.get(self.path), rows.count
        traced = torch.compiler.is_compiling()  # it guards what it reads: not `used`, which changes
        self.fast = self.direct and rows is None and ((params is not None if traced else self.used) or "first")

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.params is None and not self.off and self.adapter.place is self.adapter:  # in a module: its hooks may be those of a tool
            return self.adapter(*args, **kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the variant on a call's arguments, whatever kind of layer and of call it is."""
        try:
            W = self.W
            if self.off:
                done = None if self.watch is None else self.watch(W.given(args, kwargs), W.beside(args, kwargs))
                y = W(first_of(args, kwargs)) if self.direct else W.frozen(self.own, args, kwargs)
                if done is not None:
                    done(W.results(y))
                return y
            params = self.registered() if self.params is None else self.params
            self._note()
            self._require_own()
            if self.rows is not None:
                self.rows.require(self.path, functools.partial(W.given, args, kwargs))
                W.follow = self.rows.assumed(self.path, functools.partial(W.beside, args, kwargs)) or W.follow
            return W.call(functools.partial(self._apply, params), self.own, args, kwargs)
        except Exception as e:
            self._name(e)
            raise

    def _apply(self, params: Params, W: Any, x: Any) -> Any:
        if self.rows is None:
            return W.apply(self.variant, params, x)
        mapped = self.rows.mapped.get(self.path)
        try:
            if isinstance(mapped, int):
                return W.apply_rows_at(mapped, self.variant, params, x, self.index)
            if mapped is not None and len(mapped) != x.shape[0]:
                raise ValueError(f"expected an input with {len(mapped)} entries, as row_map has, found shape {tuple(x.shape)}.")
            return W.apply_rows(self.variant, params, x, self.index if mapped is None else mapped)
        except ValueError as e:
            raise ValueError(f'{self.rows.caller}: at "{self.path}" {e}') from e

    def read(self, name: str) -> Tensor:
        """Return a parameter of the layer as its reader in the model should find it."""
        W = self.W
        if self.off or (self.params is None and self.hollow()):
            module, own = place_of(W.layer, name)
            return module._parameters[own]  # type: ignore[return-value]
        params = self.registered() if self.params is None else self.params
        self._note()
        if self.rows is not None and not self.W.moving:  # first of all: what follows takes params of one member
            raise ValueError(
                f'{self.rows.caller}: at "{self.path}" expected a target that is called with rows of the batch, found a weight that the '
                "module around it reads: all rows see the same one. Leave it out, or run the members one by one."
            )
        self._require_place(name)
        self._note_read(name)
        if self.cfg._drops and W.training:
            raise ValueError(
                f'adapt: at "{self.path}" expected a target that is called with an input, found a weight that the module around it reads, '
                f"where {type(self.cfg).__name__} has no call to drop in. Set {' and '.join(self.cfg._drops)} to 0, or leave the layer out."
            )
        return W.read(self.variant, params, name)

    @property
    def trained(self) -> bool:
        """Whether params stand that autograd is to reach."""
        standing = [p for _, p in self._leaves()] if self.params is None else self.params.values()
        return not self.off and any(p.requires_grad for p in standing)

    def _note(self) -> None:
        if not torch.compiler.is_compiling():
            self.used = True

    def _note_read(self, name: str) -> None:
        if self.W.moving:
            return
        module, own = place_of(self.W.layer, name)
        if not torch.compiler.is_compiling():
            self.seen[own] = module._parameters[own]
        elif isinstance(module._parameters[own], nn.Parameter):
            note_traced(self.key, own)
        if self.fast:
            self.fast = "first"  # the next call looks

    def _require_own(self) -> None:
        """Refuse a layer into which the model has put a tensor that it may have made of the adapted one.

        Raises:
            ValueError: with the way out.
        """
        # After a graph break an eager call goes on in compiled pieces: the read may be in one, and the layer outside.
        seen = {**dict.fromkeys(noted(self.key)), **self.seen}
        if not seen:
            return
        if not torch.compiler.is_compiling():
            self.seen.clear()
        table = self.W.layer._parameters
        for name, p in seen.items():
            if (now := table.get(name)) is not p and now is not None and not isinstance(now, nn.Parameter):
                raise ValueError(
                    f'adapt: at "{self.path}" expected a layer with its frozen {name}, found a tensor in its place after the model has '
                    "read the adapted one, as by torch.func.functional_call in the model's own forward. It would be adapted again. Let the "
                    "forward call the layer, or torch.nn.functional.linear with the tensor."
                )

    def _require_place(self, name: str) -> None:
        """Refuse a variant that no weight holds where the weight is read, and one that moves the bias of a layer without one."""
        if torch.compiler.is_compiling() or self._placed:
            return
        if not self.cfg.linear:
            raise ValueError(
                f'adapt: at "{self.path}" expected a variant that is linear in its input, since the model reads {name!r} and calls no '
                f"layer, found {type(self.cfg).__name__}. Leave the layer out with exclude_names."
            )
        shapes = {n: tuple(p.shape) for n, p in self._leaves()}
        if self.W.shifts(self.variant, shapes):
            raise ValueError(
                f'adapt: at "{self.path}" expected a variant that changes the weight alone, since the model reads {name!r} and the layer '
                f"has no bias, found {type(self.cfg).__name__}, which adds to its output. Leave the layer out with exclude_names."
            )
        self._placed = True

    def _leaves(self) -> list[tuple[str, Tensor]]:
        """Return the adapter's parameters by name, shared ones among them."""
        shared = {name: adapter.parameters_by_name[there] for name, (adapter, there) in self.shared.items()}
        return [(name, p) for name, p in {**shared, **self.adapter.parameters_by_name}.items() if p is not None]

    def hollow(self) -> bool:
        """Whether the adapter has placeholders alone, as in a copy whose calls bring their params."""
        return any(p is not None and p.is_meta for p in self.adapter.parameters_by_name.values()) and self.W.device.type != "meta"

    def registered(self) -> Params:
        """Return the adapter's parameters as params. Placeholders are refused, since products on a CPU accept them in silence."""
        if self.hollow():
            raise RuntimeError(
                f'adapt: expected params with data at "{self.path}", found them on meta, as outside of a call. Let a forward that yields '
                "its results return a list; where the model recomputes blocks by a checkpoint of its own, leave that to build(..., remat=) "
                "instead; else pass params on its device."
            )
        return {**{name: adapter.param(there) for name, (adapter, there) in self.shared.items()}, **self.adapter.params()}


def _cast_for(W: Kind) -> Kind:
    """Note that the calls of a layer cast the params before they reach the formula."""
    W.casts = False
    return W


def _missing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("expected a forward of the layer's own, found none")
