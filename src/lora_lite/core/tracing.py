"""Whether something traces or transforms the code that runs."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _remove_batch_dim,
    _unwrap_batched,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
    temporarily_pop_interpreter_stack,
)
from torch._functorch.vmap import lazy_load_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lora_lite.core.autocast import narrowed

F = TypeVar("F", bound=Callable[..., Any])


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()  # `peek_interpreter_stack() is None` is never true while compiling


def forward_mode() -> bool:
    """Whether `torch.func.jvp` is active."""
    return any(interpreter.key() == TransformType.Jvp for interpreter in retrieve_all_functorch_interpreters())


def dual_numbers() -> bool:
    """Whether a level of `torch.autograd.forward_ad` is open that is not of `torch.func.jvp`: a user's, or of `torch.func.linearize`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and not eager_transforms.JVP_NESTING


def differentiated(tensor: Tensor) -> bool:
    """Whether `torch.func.grad`, or another transform in reverse mode, differentiates by a tensor or by what it is computed from."""
    modes = {interpreter.level(): interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
    while is_functorch_wrapped_tensor(tensor):
        if modes.get(maybe_get_level(tensor)) == TransformType.Grad:
            return True
        tensor = get_unwrapped(tensor)
    return False


def in_transform() -> bool:
    """Whether a transform, a compilation or inference mode is active. In inference mode plain autograd records nothing."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or transformed()


def require_constant(tensors: Iterable[Tensor], call: str, made: str) -> None:
    """Refuse params that `torch.func.grad` differentiates by, for a call whose results are constants: their gradient would be zero."""
    if transformed() and not torch.compiler.is_compiling() and any(map(differentiated, tensors)):
        raise ValueError(
            f"{call}: expected params that no transform differentiates by, found those of torch.func.grad or its kin: {made} are "
            "constants, with gradients of zero. Differentiate adapt(params, batch) itself, or call this outside."
        )


def require_read(tensors: Iterable[Tensor], call: str, name: str = "params", mapped: bool = False) -> None:
    """Refuse tensors of transforms, for a call that reads their values. With `mapped` only those of `vmap`, which have many."""
    if torch.compiler.is_compiling():
        return
    for tensor in filter(is_functorch_wrapped_tensor, tensors):  # known by themselves: the call may stand outside of the transform
        if (many := _mapped_over(tensor)) or not mapped:
            by, way = ("torch.vmap", ", once for each") if many else ("torch.func.grad or its kin", "")
            raise ValueError(
                f"{call}: expected {name} whose values can be read, found those of {by}. Call it outside of the transform{way}; inside, "
                "adapt(params, batch) runs the adapted model."
            )


def _mapped_over(tensor: Tensor) -> bool:
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


def untransformed(f: F) -> F:
    """Run a function outside of transforms: what it draws is the same for all that `vmap` maps over, whatever randomness that asks for."""

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not transformed():
            return f(*args, **kwargs)
        with temporarily_clear_interpreter_stack():
            return f(*args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspend transforms and tracing modes, to make what outlives a call: tensors made inside one are wrapped, and end with it."""
    recorder = torch._C._get_tracing_state()  # of torch.jit.trace
    if recorder is not None:
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # not in torch's stubs
    try:
        with temporarily_clear_interpreter_stack(), _disable_current_modes():
            yield
    finally:
        if recorder is not None:  # a compiled graph lets nobody set it, to nothing neither
            torch._C._set_tracing_state(recorder)  # type: ignore[attr-defined]


def valueless(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values: on meta, or made under `FakeTensorMode`."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def made_anew() -> bool:
    """Whether tensors of a cache are made anew: while a compiler traces, and under modes that make others, as `FakeTensorMode` does."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def require_values(tensors: Iterable[Any]) -> None:
    """Refuse tensors without values, such as those by which `make_fx` traces: a trial of a mixed batch runs the model on them.

    Raises:
        ValueError: with the way out.
    """
    if not torch.compiler.is_compiling() and any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise ValueError(
            "adapt.mixed: expected tensors with values, by which the rows are followed to the targets, found fake ones, as of make_fx. "
            'Trace with make_fx(f, tracing_mode="real"), or compile the function by torch.compile.'
        )


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside those of active transforms; of the many that `vmap` maps over the first."""
    axes = []
    while is_functorch_wrapped_tensor(tensor):
        axes += [maybe_get_bdim(tensor)] if is_batchedtensor(tensor) else []
        tensor = get_unwrapped(tensor)
    for axis in reversed(axes):  # that of an outer vmap first: inner ones count the axes without it
        tensor = tensor.select(axis, 0)
    return tensor


def while_traced(f: F) -> F:
    """Let the compiler run a function while it traces, instead of tracing it. It is not run again by the compiled code.

    Arguments must be constants, and the compiler takes the result for one.
    """
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, without importing the compiler
    return f


def uncompiled(asked: bool = True) -> AbstractContextManager[Any]:
    """Return a context in which functions that `torch.compile` has decorated run as they are written, if that is asked for."""
    loaded = "torch._dynamo" in sys.modules  # else there is none, and no need to import the compiler
    return torch.compiler.set_stance("force_eager") if asked and loaded else nullcontext()


def vmap_rows(f: Callable[..., Any], params: Mapping[str, Tensor], *xs: Tensor) -> Any:
    """Map `f(params, *xs)` over the first axis of all tensors, as `torch.vmap` with different randomness does, at half its price.

    `torch.vmap` flattens its arguments as trees, which at each layer of a model takes as long as the arithmetic of a few tokens. While
    compiling it is `torch.vmap` itself.
    """
    if torch.compiler.is_compiling():
        with narrowed(xs[0]):
            return _vmapped(f, params, xs)
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise RuntimeError(
            "adapt: expected rows with params of their own outside of hooks on saved tensors, found such hooks, as of a checkpoint that "
            "the model began by itself: they cannot keep what belongs to one row. Switch checkpointing on before build, or name the "
            'blocks, build(..., remat=r"layers\\.\\d+$").'
        )
    lazy_load_decompositions()
    with narrowed(xs[0]):
        return _mapped(f, params, xs)


def _vmapped(f: Callable[..., Any], params: Mapping[str, Tensor], xs: tuple[Tensor, ...]) -> Any:
    """Run `torch.vmap`, which takes no result but tensors. What else there is beside them, such as None, is one for all rows."""
    beside: list[Any] = []

    def tensors_of(params: Mapping[str, Tensor], *xs: Tensor) -> Any:
        y = f(params, *xs)
        if isinstance(y, Tensor):
            return y
        leaves, form = pytree.tree_flatten(y)
        beside[:] = [form, [(isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    found = torch.vmap(tensors_of, randomness="different")(params, *xs)
    if not beside:
        return found
    tensors = iter(found)
    return pytree.tree_unflatten([next(tensors) if mapped else leaf for mapped, leaf in beside[1]], beside[0])


def _mapped(f: Callable[..., Any], params: Mapping[str, Tensor], xs: tuple[Tensor, ...]) -> Any:
    # Not torch's contexts: a Ctrl-C between two of their steps leaves in place for all that runs later what they set.
    rows, around, refused = xs[0].shape[0], maybe_current_level(), _AUTOGRAD._saved_tensors_hooks_get_disabled_error_message()
    try:
        _AUTOGRAD._saved_tensors_hooks_disable(refused or _NO_HOOKS)  # as torch.vmap, whose rules these are
        level = _vmap_increment_nesting(rows, "different")
        y = f({name: _add_batch_dim(p, 0, level) for name, p in params.items()}, *(_add_batch_dim(x, 0, level) for x in xs))
        if isinstance(y, Tensor):
            found = _remove_batch_dim(y, level, rows, 0)
        else:
            found = pytree.tree_map_only(Tensor, lambda t: _remove_batch_dim(t, level, rows, 0), y)
        _leave(around, refused)
    except BaseException:  # of f, or a Ctrl-C while it leaves, which `finally` would not do again
        _leave(around, refused)
        raise
    return found


def _leave(around: int | None, refused: str | None) -> None:
    while (level := maybe_current_level()) is not None and level > (around or 0):
        _vmap_decrement_nesting()
    if refused is None:
        _AUTOGRAD._saved_tensors_hooks_enable()


_AUTOGRAD = torch._C._autograd
_NO_HOOKS = "adapt.mixed: expected a model that sets no hooks on saved tensors inside a layer with params for each row, found some."


def by_vmap(x: Tensor) -> bool:
    """Whether the innermost transform is a `vmap` that maps over an axis of `x`. Never while compiling, which fuses by itself."""
    return not torch.compiler.is_compiling() and is_batchedtensor(x) and maybe_get_level(x) == maybe_current_level()


def beneath_vmap(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call `f` once on whole tensors, where one is `by_vmap`. The mapped axis is the first, of the result too.

    `vmap` takes fused products apart: of an `addmm` it makes a product, a copy of the other summand and a sum. `f` chooses the products.

    Args:
        f: draws no random numbers. It gets a tensor that is not mapped as it is, without that axis.
        *tensors: its arguments.
    """
    level: Any = maybe_current_level()
    values = [_unwrap_batched(t, level) for t in tensors]
    with temporarily_pop_interpreter_stack():
        y = f(*(value if axis is None else value.movedim(axis, 0) for value, axis in values))
    return _add_batch_dim(y, 0, level)


def each_first(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `f(x)` for an `f` that takes each entry of the first axis by itself. In a `vmap` it runs once, on the entries of all rows."""
    if not by_vmap(x):
        return f(x)
    return beneath_vmap(lambda x: f(x.flatten(0, 1)).unflatten(0, x.shape[:2]), x)
