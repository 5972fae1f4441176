"""Whether something traces or transforms the code that runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()  # `peek_interpreter_stack() is None` is never true while compiling


def forward_mode() -> bool:
    """Whether `torch.func.jvp` is active."""
    return any(interpreter.key() == TransformType.Jvp for interpreter in retrieve_all_functorch_interpreters())


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
