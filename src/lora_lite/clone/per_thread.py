"""Replicas: the clones that calls run on, one for each thread.

`functional_call` swaps tensors into a module for the length of a call, so two threads on one module would mix up their params.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.bind import call, volatile_buffers
from lora_lite.clone.never_called import Audit


class Replica:
    """One clone, with what a call on it has to look after."""

    def __init__(self, module: nn.Module, paths: list[str]) -> None:
        self.module = module
        self._volatile = volatile_buffers(module)
        self._audit = Audit(module, paths)

    def __call__(self, tensors: Mapping[str, Tensor], batch: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run the clone with `tensors` in place; a forward that updates buffers updates copies."""
        state = {name: buffer.clone() for name, buffer in self._volatile.items()}
        if torch.compiler.is_compiling() or not self._audit.unseen:
            return call(self.module, {**tensors, **state}, batch, kwargs)
        with self._audit.watch():
            return call(self.module, {**tensors, **state}, batch, kwargs)


class Replicas:
    """The copies of one clone, a thread each."""

    def __init__(self, template: nn.Module, copy: Callable[[nn.Module], nn.Module], paths: list[str]) -> None:
        # The template is never called: a copy taken during a call would keep that call's tensors.
        self._make = lambda: Replica(copy(template), paths)
        self.main = self._make()
        self._local = threading.local()
        self._local.replica = self.main  # the thread that builds keeps the first

    def here(self) -> Replica:
        """Give this thread's replica, made at its first call."""
        if torch.compiler.is_compiling():
            return self.main  # tracing swaps nothing in for good, and asking for the thread cannot be traced
        replica = getattr(self._local, "replica", None)
        if replica is None:
            replica = self._local.replica = self._make()
        return replica
