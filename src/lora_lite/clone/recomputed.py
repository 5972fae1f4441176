"""Functions of tensors that keep nothing but their inputs: their derivatives run them again.

A derivative is such a function too, and so are those of any order. The graph of a gradient, which `torch.func.grad` always builds, then
holds the inputs of a block and the gradients of its outputs, and none of its activations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.autocast import Autocast, autocast_as, autocast_state
from lora_lite.core.tracing import forward_mode, transformed

Tensors = Sequence[Tensor]
RandomState = tuple[Tensor, dict[int, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """A function of tensors, opaque to transforms: they would wrap the random state like an input.

    Args:
        run: the function.
        rng: the random state of its first run, in which each further one begins; None where it draws nothing.
        autocast: the state of autocast in its first run, and in each further one.
    """

    run: Callable[[Tensors], Tensors]
    rng: RandomState | None = None
    autocast: Autocast = field(default_factory=autocast_state)

    def pullback(self, places: Sequence[int], inputs: int) -> "Recipe":
        """Return the gradients of the inputs at `places`, as a function of all `inputs` tensors and the gradients of the outputs."""

        def run(given: Tensors) -> Tensors:
            tensors, grads = given[:inputs], given[inputs:]
            found = _vjp(self._of(places, tensors), [tensors[k] for k in places], tuple(g for g in grads if _smooth(g)))
            known = set(map(id, given))
            return [g.clone() if id(g) in known else g for g in found]  # a Function takes an input handed through for a copy

        return Recipe(run)

    def pushforward(self, places: Sequence[int], inputs: int) -> "Recipe":
        """Return the tangents of the outputs, as a function of all `inputs` tensors and the tangents of those at `places`."""

        def run(given: Tensors) -> Tensors:
            tensors, tangents = given[:inputs], given[inputs:]
            at = tuple(tensors[k].contiguous() for k in places)  # an expanded tensor cannot carry a tangent
            along: tuple[Tensor, ...] = torch.func.jvp(self._of(places, tensors), at, tuple(tangents))[1]
            return along

        return Recipe(run)

    def _of(self, places: Sequence[int], tensors: Tensors) -> Callable[..., tuple[Tensor, ...]]:
        """Return it as a function of the inputs at `places`, with the outputs that have derivatives. The others are those in `tensors`."""

        def f(*chosen: Tensor) -> tuple[Tensor, ...]:
            filled = list(tensors)
            for k, tensor in zip(places, chosen):
                filled[k] = tensor
            with _restored(self.rng), autocast_as(self.autocast):
                return tuple(t for t in self.run(filled) if _smooth(t))

        return f


class Recompute(torch.autograd.Function):
    """Run a recipe: `Recompute.apply(recipe, *tensors)` returns its outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recipe: Recipe, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(recipe.run(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recipe, *tensors = inputs
        ctx.smooth = [_smooth(t) for t in output]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        places = [k for k, need in enumerate(ctx.needs_input_grad[1:]) if need]
        found = dict(zip(places, Recompute.apply(ctx.recipe.pullback(places, len(tensors)), *tensors, *grads)))
        return None, *(found.get(k) for k in range(len(tensors)))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        places = [k for k, t in enumerate(tangents) if t is not None]
        recipe = ctx.recipe.pushforward(places, len(tensors))
        along = iter(Recompute.apply(recipe, *tensors, *(tangents[k] for k in places)))
        return tuple(next(along) if smooth else None for smooth in ctx.smooth)


def _smooth(tensor: Tensor) -> bool:
    """Whether a tensor has derivatives: integers have none."""
    return tensor.is_floating_point() or tensor.is_complex()


def _vjp(f: Callable[..., tuple[Tensor, ...]], at: list[Tensor], grads: tuple[Tensor, ...]) -> Tensors:
    """Pull gradients back through `f`. The result has a graph of its own where something differentiates it, and only there."""
    recorded = torch.is_grad_enabled()
    if transformed():
        twice = recorded or forward_mode()  # some backward passes, such as SiLU's, have a forward-mode rule only where they are recorded
        pulled: Tensors = torch.func.vjp(f, *at)[1](grads, retain_graph=twice, create_graph=twice)
        return pulled
    at = [t if recorded and t.requires_grad else t.detach().requires_grad_() for t in at]
    with torch.enable_grad():
        out = f(*at)
    pairs = [(o, g) for o, g in zip(out, grads) if o.requires_grad]
    outputs, weights = [o for o, _ in pairs], [g for _, g in pairs]
    return torch.autograd.grad(outputs, at, weights, create_graph=recorded, allow_unused=True, materialize_grads=True)


def random_state(block: nn.Module, tensors: Tensors) -> RandomState:
    """Return the random state of the CPU and of the devices of some tensors, in which `block` begins a run.

    A block in evaluation mode may draw too (Monte Carlo dropout). While a CUDA graph is captured, the state of a device cannot be read. It
    is left out then where all of the block is in evaluation mode.
    """
    devices = {t.get_device() for t in tensors if t.is_cuda}
    if devices and torch.cuda.is_current_stream_capturing() and not any(module.training for module in block.modules()):
        devices = set()
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


@contextmanager
def _restored(rng: RandomState | None) -> Iterator[None]:
    if rng is None:
        yield
        return
    cpu, cuda = rng
    with torch.random.fork_rng(list(cuda)):
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)
        yield
