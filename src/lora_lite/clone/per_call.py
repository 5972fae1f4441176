"""A call on a bound copy, with the call's params and the model's own state in place. Each thread has its own copy."""

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_lite.clone.bind import Binding, Uniform
from lora_lite.clone.made import Made
from lora_lite.clone.rows import Rows
from lora_lite.clone.settings import Settings
from lora_lite.clone.state import State, volatile_buffers
from lora_lite.clone.written import Weights
from lora_lite.core.plan import Places, reaching
from lora_lite.core.tracing import outside_transforms, while_traced
from lora_lite.core.tree import AnyTree


class Call(NamedTuple):
    """The tensors of a target's call, as something reads them: its input, those beside it, and those of its result, by their places."""

    given: Any
    beside: dict[str, Any]
    results: dict[str, Any]


class Replica:
    """A bound copy, which one thread calls.

    Args:
        module: the copy.
        bindings: of its targets, and of the modules that follow them.
        shared: where a params tree has the tensors that a target shares with others, by path, for those that do.
        settings: of the copy; None for one that is a module of its own.
    """

    def __init__(
        self, module: nn.Module, bindings: Sequence[Binding], shared: Mapping[str, Places], settings: Settings | None = None
    ) -> None:
        self.module, self.bindings = module, [(binding.path, binding) for binding in bindings]
        self._shared, self._inside, self._settings = shared, False, settings
        self._uniform = Uniform()
        for binding in bindings:
            binding.uniform = self._uniform
        self._state: State | None = None  # made by the first call, which finds the copy as it is to stay
        self._weights: Weights | None = None
        self._traced = self._compiled = self._tried = False
        self._volatile = volatile_buffers(module)

    def adapted(
        self,
        params: AnyTree,
        batch: Any,
        kwargs: Mapping[str, Any],
        dtype: torch.dtype | None,
        rows: Rows | None = None,
        index: Tensor | None = None,
    ) -> Any:
        """Run the adapted model.

        Args:
            params, batch, kwargs: as in the user's call.
            dtype: of all leaves, None where there are several or nobody has looked.
            rows: for a mixed batch, as `Followed.rows` returns it.
            index: the member of each row.
        """
        if self._shared:
            leaves = [reaching(params, p, self._shared[p]) for p, _ in self.bindings]
        else:
            leaves = [params[path] for path, _ in self.bindings]
        return self._call(leaves, batch, kwargs, rows, index, dtype=dtype)

    def frozen(self, batch: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run the model without its adapters."""
        return self._call([None] * len(self.bindings), batch, kwargs, None, None, off=True)

    def seen(self, batch: Any, kwargs: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[str, list[Call]]:
        """Run the model without its adapters; return what `read` makes of the tensors of each call, by target."""
        seen: dict[str, list[Call]] = {}

        def note(path: str, x: Any, beside: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], None]:
            call = Call(read(x), {name: read(value) for name, value in beside.items()}, {})
            seen.setdefault(path, []).append(call)
            return lambda results: call.results.update({name: read(value) for name, value in results.items()})

        for path, binding in self.bindings:
            binding.watch = functools.partial(note, path)
        try:
            self.frozen(batch, kwargs)
        finally:
            for _, binding in self.bindings:
                binding.watch = None
        return seen

    def _call(
        self,
        leaves: Sequence[Any],
        batch: Any,
        kwargs: Mapping[str, Any],
        rows: Rows | None,
        index: Tensor | None,
        off: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Any:
        args, kwargs = arguments(batch, kwargs)
        # A hook of the model may call it again: then what stands is put back after, else nothing is left standing.
        before = [b.standing for _, b in self.bindings] if self._inside else ()
        was_inside, self._inside = self._inside, True
        was_dtype, self._uniform.dtype, self._uniform.graded = self._uniform.dtype, dtype, torch.is_grad_enabled()
        traced = torch.compiler.is_compiling()
        plain = not (traced or was_inside or off) and rows is None
        try:
            for (_, binding), own in zip(self.bindings, leaves):
                if plain:
                    binding.params = own  # the rest stands as a plain call finds it
                else:
                    binding.set(own, rows, index, off)
            return self._traced_run(args, kwargs) if traced else self._run(args, kwargs, was_inside)
        finally:
            self._inside, self._uniform.dtype = was_inside, was_dtype
            for _, binding in self.bindings:
                if plain:
                    binding.params = None
                else:
                    binding.set(None)
            for (_, binding), was in zip(self.bindings, before):
                binding.set(*was)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], inside: bool) -> Any:
        """Run the copy from the state that it had at the build, and leave it there."""
        if self._state is None or self._weights is None:
            self._state, self._weights = State(self.module), Weights(self.module)
        state, versions, settings = self._state, self._weights.versions(), self._settings
        made = None if self._tried else Made(self.module)
        around = state.now() if inside else None
        if inside or self._traced:
            state.leave()
            self._traced = False
        if settings is not None:
            if self._compiled and not inside:
                settings.restore()  # compiled code takes settings over too
            settings.follow()
        try:
            state.enter()
            result = self.module(*args, **kwargs)
            self._weights.require(versions)
            if made is not None:
                made.require()
                self._tried = True
            return result
        finally:
            state.leave()
            if settings is not None:
                settings.restore()
            if around is not None:
                state.put(around)

    def settle(self) -> None:
        """Put the copy in the state that it had at the build, before a trace as before an eager call: a compiled one may have left it."""
        if self._inside:
            return
        for _, binding in self.bindings:
            binding.forget_traced()
        if self._state is None or self._weights is None:
            self._state, self._weights = State(self.module), Weights(self.module)
        self._state.leave()
        if self._settings is not None:
            self._settings.restore()
            self._settings.follow()

    def _traced_run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the copy where the compiler traces: copies of buffers, and what the trace changes else is put back by the next call."""
        self._traced = self._compiled = True
        if self._settings is not None:
            self._settings.read()
        if not self._volatile:
            return self.module(*args, **kwargs)
        state = {name: buffer.clone() for name, buffer in self._volatile.items()}
        return torch.func.functional_call(self.module, state, args, dict(kwargs), tie_weights=False)


class Replicas:
    """The bound copies of a plan, one for each thread that calls: a call puts its params into the copy that it runs on."""

    def __init__(self, make: Callable[[], Replica]) -> None:
        self._make = make
        self._main: Replica | None = None
        self._lock = threading.Lock()
        self._local = threading.local()
        self._local.builds = True
        self._prepare = while_traced(lambda: self.main.settle())
        _MADE.add(self)

    @property
    def main(self) -> Replica:
        """The copy of the thread that builds, made when it is first needed."""
        self._settle()
        return cast("Replica", self._main)

    def here(self) -> Replica:
        """Return this thread's copy, made at its first call."""
        if torch.compiler.is_compiling():  # tracing swaps nothing in for good, and asking for the thread cannot be traced
            self._prepare()
            return cast("Replica", self._main)
        replica: Replica | None = getattr(self._local, "replica", None)
        if replica is None:
            replica = self._local.replica = self.main if hasattr(self._local, "builds") else self._new()
        return replica

    def _settle(self) -> None:
        with self._lock:
            self._main = self._main or self._new()

    def _new(self) -> Replica:
        with outside_transforms():
            return self._make()

    def forked(self) -> None:
        """Open the lock in a child process: the thread that held it is not there."""
        self._lock = threading.Lock()


_MADE: WeakSet[Replicas] = WeakSet()


def _forked() -> None:
    for replicas in list(_MADE):
        replicas.forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


def arguments(batch: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the model's call on a batch.

    Raises:
        TypeError: for a batch of another type.
    """
    if isinstance(batch, Mapping):
        return (), {**batch, **kwargs}
    if isinstance(batch, Tensor):
        return (batch,), dict(kwargs)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return tuple(batch), dict(kwargs)
    raise TypeError(
        f"adapt: expected batch as a mapping (model(**batch)), a tuple or list (model(*batch)) or a tensor, found "
        f"{type(batch).__name__}. Wrap a single argument as (argument,)."
    )
