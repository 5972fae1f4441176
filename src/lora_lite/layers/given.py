"""Weights that the model gives to an autograd Function: it takes the stand-in of an adapted weight for the frozen parameter."""

import functools
import inspect
import sys
from types import CodeType
from typing import Any

import torch

from lora_lite.core.errors import exactly
from lora_lite.core.tracing import while_traced


class GivenToFunction(RuntimeError):
    """A stand-in was given to an autograd Function: `binding` is that of its layer, whose forward may run again with the tensor itself."""

    def __init__(self, binding: Any, message: str) -> None:
        super().__init__(message)
        self.binding = binding


def require_followed(stand_in: Any) -> None:
    """Refuse a stand-in that an autograd Function was given, as TRL's loss is: autograd takes it for the frozen parameter.

    The Function computes with the adapted weight, and its backward finds no way to the params. Where one only runs modules that read the
    weight, as a checkpointed block does, its recomputation finds it.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if (name := _function_of(code)) is not None:
            own = frame.f_locals
            given = [own.get(name) for name in code.co_varnames[: code.co_argcount + bool(code.co_flags & inspect.CO_VARARGS)]]
            ctx = next((value for value in given if hasattr(value, "needs_input_grad")), None)
            whole = any(value is stand_in or (isinstance(value, tuple) and any(v is stand_in for v in value)) for value in given)
            followed = stand_in.binding.W.training or stand_in.binding.uniform.graded or any(getattr(ctx, "needs_input_grad", ()))
            if whole and (stand_in.binding.W.tries or followed):
                raise GivenToFunction(stand_in.binding, _given(stand_in.binding.path, name))
        frame = frame.f_back


def _given(path: str, name: str, way: str = "") -> str:
    return (
        f'adapt: at "{path}" expected a weight that autograd follows, found it given to {name}, an autograd Function, through which the '
        f'adapter would get no gradient. {way}Leave the layer out, exclude_names=(r"{exactly(path)}",), or use a loss that calls the '
        "layer."
    )


@while_traced
def require_traced(path: str, again: bool) -> None:
    """Refuse the same where the compiler traces the Function's forward. `again` tells a layer whose own forward runs again."""
    frame: Any = sys._getframe(1)
    while frame is not None:  # the compiler keeps what it traces in an attribute of its own frames
        code = getattr(frame.f_locals.get("self"), "__dict__", {}).get("f_code")
        if isinstance(code, CodeType) and (name := _function_of(code)) is not None:
            raise RuntimeError(_given(path, name, "Call adapt once before it is compiled. Else: " if again else ""))
        frame = frame.f_back


@functools.lru_cache(maxsize=4096)  # it is asked of every frame below a weight that is read
def _function_of(code: Any) -> str | None:
    """Return the name of the autograd Function whose forward has this code, if one has. Its `apply` leaves no frame in torch 2.15."""
    classes: list[Any] = [torch.autograd.Function]
    for cls in classes:
        classes += cls.__subclasses__()
    return next((cls.__name__ for cls in classes if getattr(inspect.unwrap(cls.forward), "__code__", None) is code), None)
