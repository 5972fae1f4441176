"""Torch's functions replaced in the calls of a variant, such as those that `vmap` cannot map as they are."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from lora_lite.core.frozen import Frozen, Params

Functions = Mapping[Callable[..., Any], Callable[..., Any]]
"""By one of torch's functions, what runs in its place."""


def replaced(f: Any, functions: Functions) -> Any:
    """Return a variant in whose calls other functions run in the place of torch's."""

    def run(params: Params, W: Frozen, x: Any) -> Any:
        with _Replaced(functions):
            return f(params, W, x)

    return run if functions else f


class _Replaced(TorchFunctionMode):
    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self._functions.get(func, func)(*args, **(kwargs or {}))
