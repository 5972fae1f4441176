"""Starts, constants, merged weights and files are made the same way, whatever is set around the call that makes them."""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch

from lora_lite.core.autocast import autocast_state

F = TypeVar("F", bound=Callable[..., Any])


def made_alike(f: F) -> F:
    """Run a function as in a fresh process, whose default device is the CPU and whose default dtype is float32.

    Generators draw on the CPU, and other numbers in other dtypes; results go to the layers' devices by name. Autocast is off, since it
    would round weights, and so is inference mode, whose tensors can never be trained.

    Not for what runs the user's model, which may rely on any of these.
    """

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _HERE.inside:  # each target's start is made in that of all
            return f(*args, **kwargs)
        with ExitStack() as stack:
            for context in _contexts():
                stack.enter_context(context)
            _HERE.inside = True
            try:
                return f(*args, **kwargs)
            finally:
                _HERE.inside = False

    return run  # type: ignore[return-value]


class _Here(threading.local):
    """Whether this thread runs such a function."""

    inside = False


_HERE = _Here()


def _contexts() -> list[AbstractContextManager[Any]]:
    """Return the contexts that undo what is set; none of them where nothing is, since each has its price for every call of torch."""
    found: list[Any] = []
    if torch.get_default_device().type != "cpu":
        found.append(torch.device("cpu"))
    if torch.get_default_dtype() is not torch.float32 or _FLOAT32.inside:
        found.append(_FLOAT32)
    found += [torch.autocast(device, enabled=False) for device, (_, on) in autocast_state().items() if on]
    if torch.is_inference_mode_enabled():
        found += [torch.inference_mode(False), torch.no_grad()]  # the first alone would switch gradients on
    return found


class _Float32:
    """The default dtype as float32. It is that of all threads: the last of them to leave puts back what the first one found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found = torch.float32
        self.inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self.inside:
                self._found = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.inside -= 1
            if not self.inside:
                torch.set_default_dtype(self._found)

    def forked(self) -> None:
        """Begin anew in a child process, where no other thread is left to leave, and a lock that one of them held stays shut."""
        self._lock = threading.Lock()
        if self.inside and not _HERE.inside:
            torch.set_default_dtype(self._found)
        self.inside = int(_HERE.inside and self.inside > 0)


_FLOAT32 = _Float32()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_FLOAT32.forked)
