"""Placement of tensors without a device of their own: the CPU, where the generators draw, whatever the default device is."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def made_on_cpu(f: F) -> F:
    """Run a function with the CPU as the default device; its results go to the layers' devices by name.

    Not for what runs the user's model, which may rely on `torch.set_default_device`.
    """

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "cpu":  # the mode has its price for each call of torch
            return f(*args, **kwargs)
        with torch.device("cpu"):
            return f(*args, **kwargs)

    return run  # type: ignore[return-value]
