"""Checks of derivatives against central differences in float64."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_lite.core.config import AdapterConfig
from lora_lite.testing._case import GRADIENTS, Case, close, fail, float64


class _DetachedFixed(TorchFunctionMode):
    """Replay the detached values of the first point: finite differences do not see `detach`."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        self.replay: Iterator[Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not Tensor.detach:
            return func(*args, **(kwargs or {}))
        if self.replay is None:
            self.values.append(func(*args))
            return self.values[-1]
        return next(self.replay)


def _difference(f: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, step: float = 1e-5) -> Tensor:
    """Compute the central difference of `f`, with detached terms fixed at their values in `at`."""
    fixed = _DetachedFixed()
    with fixed:
        f(at)
    sides = []
    for sign in (1, -1):
        fixed.replay = iter(fixed.values)
        with fixed:
            sides.append(f(at + sign * step * along))
    return (sides[0] - sides[1]) / (2 * step)


def _delta_of(case: Case, name: str, leaf: Tensor) -> Tensor:
    return case.delta({**case.params, name: leaf})


def _leaves(case: Case) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """Yield every leaf, and `x`, with the variant's update as a function of it alone."""
    for name, leaf in case.params.items():
        yield name, leaf, functools.partial(_delta_of, case, name)
    yield "x", case.x, lambda t: case.delta(case.params, t)


def gradients(cfg: AdapterConfig) -> None:
    """Reverse-mode gradients of every leaf agree with finite differences in float64."""
    for case in float64(cfg):
        g = torch.Generator().manual_seed(1)
        for name, leaf, f in _leaves(case):
            weights = torch.randn(f(leaf).shape, generator=g, dtype=leaf.dtype)
            grad = torch.func.grad(lambda t, f=f, w=weights: (f(t) * w).sum())(leaf)
            if name in case.params and not grad.abs().max() > 0:
                fail(f"a gradient for {name}", "none")
            for _ in range(3):
                along = torch.randn(leaf.shape, generator=g, dtype=leaf.dtype)
                want = (_difference(f, leaf, along) * weights).sum()
                close(f"the gradient of {name}", (grad * along).sum(), want, GRADIENTS)


def forward_mode(cfg: AdapterConfig) -> None:
    """Forward-mode derivatives of every leaf agree with finite differences in float64."""
    for case in float64(cfg):
        g = torch.Generator().manual_seed(2)
        for name, leaf, f in _leaves(case):
            along = torch.randn(leaf.shape, generator=g, dtype=leaf.dtype)
            close(f"the jvp of {name}", torch.func.jvp(f, (leaf,), (along,))[1], _difference(f, leaf, along), GRADIENTS)
