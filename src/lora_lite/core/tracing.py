"""Whether something traces or transforms the code that runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _remove_batch_dim
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.vmap import doesnt_support_saved_tensors_hooks, lazy_load_decompositions, vmap_increment_nesting
from torch.utils._python_dispatch import _disable_current_modes


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()  # `peek_interpreter_stack() is None` is never true while compiling


def in_transform() -> bool:
    """Whether a transform, a compilation or inference mode is active. In inference mode plain autograd records nothing."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or transformed()


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspend transforms and tracing modes, to make what outlives a call: tensors made inside one are wrapped, and end with it."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def while_traced(f: Callable[[], None]) -> Callable[[], None]:
    """Let the compiler run a function while it traces, instead of tracing it. It is not run again by the compiled code."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, without importing the compiler
    return f


def vmap_rows(f: Callable[..., Tensor], params: Mapping[str, Tensor], *xs: Tensor) -> Tensor:
    """Map `f(params, *xs)` over the first axis of all tensors, as `torch.vmap` with different randomness does, at half its price.

    `torch.vmap` flattens its arguments as trees, which at each layer of a model takes as long as the arithmetic of a few tokens. While
    compiling it is `torch.vmap` itself.
    """
    if torch.compiler.is_compiling():
        return torch.vmap(f, randomness="different")(params, *xs)
    lazy_load_decompositions()
    found: Tensor = _mapped(f, params, xs)
    return found


@doesnt_support_saved_tensors_hooks  # as torch.vmap, whose rules these are
def _mapped(f: Callable[..., Tensor], params: Mapping[str, Tensor], xs: tuple[Tensor, ...]) -> Tensor:
    rows = xs[0].shape[0]
    with vmap_increment_nesting(rows, "different") as level:
        y = f({name: _add_batch_dim(p, 0, level) for name, p in params.items()}, *(_add_batch_dim(x, 0, level) for x in xs))
        return _remove_batch_dim(y, level, rows, 0)
