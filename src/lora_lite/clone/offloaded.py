"""Weights that accelerate keeps on the CPU or on disk, fetched for each product and let go after it.

In a copy a stand-in takes the place of each: it has the weight's shape and dtype, is on the device where the layer computes, and holds no
data. Any operation fetches the weight. A linear layer fetches it again in the backward pass, so that nothing of it is kept between the two.
What else an operation keeps of a fetched weight stays until the backward pass; in recomputed blocks that is nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.core.tree import join
from lora_lite.layers.access import FACTS, place_of


@dataclass(frozen=True)
class Source:
    """The place that an offloaded tensor is fetched from.

    Args:
        weights: the hook's mapping from names in its module to tensors, read at each fetch.
        name: that of the tensor.
        device: where the layer computes.
        dtype: in which it does.
    """

    weights: Mapping[str, Tensor]
    name: str
    device: torch.device
    dtype: torch.dtype

    def fetch(self) -> Tensor:
        """Return the tensor as the layer computes with it."""
        return self.weights[self.name].detach().to(self.device, self.dtype)


class Offloaded(Tensor):
    """The stand-in for an offloaded tensor."""

    source: Source

    @classmethod
    def of(cls, source: Source, shape: Sequence[int]) -> "Offloaded":
        """Make the stand-in for a tensor of this shape."""
        self: Offloaded = torch.empty((), dtype=source.dtype, device=source.device).expand(tuple(shape)).as_subclass(cls)
        self.source = source
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, attribute = getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and attribute == "data":
            return args[0]
        if name == "__set__":
            raise RuntimeError(
                f'expected a tensor in memory, found "{args[0].source.name}", which accelerate offloads: it cannot be moved or cast. Load '
                "the model where and as it is to compute."
            )
        if name == "__get__" and attribute in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.linear and not kwargs and isinstance(args[1], Offloaded) and not isinstance(args[0], Offloaded):
            return _linear(*args)
        return func(*(_fetched(a) for a in args), **{key: _fetched(a) for key, a in kwargs.items()})

    def __deepcopy__(self, memo: Any) -> "Offloaded":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Offloaded.of, (self.source, tuple(self.shape))


def _fetched(value: Any) -> Any:
    if isinstance(value, Offloaded):
        return value.source.fetch()
    if isinstance(value, list | tuple) and any(isinstance(v, Offloaded) for v in value):
        return type(value)(_fetched(v) for v in value)
    return value


def _linear(x: Tensor, weight: Offloaded, bias: Tensor | None = None) -> Tensor:
    if isinstance(bias, Offloaded):
        y: Tensor = _Linear.apply(weight.source, bias.source, x, False)
        return y
    y = _Linear.apply(weight.source, None, x, False)
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    """The layer `x W^T + b`, or the product `x W` with `transposed`. Only where the weight lies is kept."""

    @staticmethod
    def forward(weight: Source, bias: Source | None, x: Tensor, transposed: bool) -> Tensor:
        W = weight.fetch()
        return x @ W.to(x.dtype) if transposed else F.linear(x, W, None if bias is None else bias.fetch())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight, _, _, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        return None, None, _Linear.apply(ctx.weight, None, grad, not ctx.transposed), None

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, tangent: Tensor, ___: None) -> Tensor:
        along: Tensor = _Linear.apply(ctx.weight, None, tangent, ctx.transposed)
        return along

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], weight: Source, bias: Source | None, x: Tensor, transposed: bool) -> tuple[Tensor, int]:
        return _Linear.apply(weight, bias, x.movedim(in_dims[2], 0), transposed), 0


def fetch_in_place(copied: nn.Module, hook: Any) -> None:
    """Put stand-ins where a copied module has the tensors on meta that one of accelerate's hooks fetches."""
    tensors = [*copied.named_parameters(remove_duplicate=False), *copied.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if tensor.is_meta and name in hook.weights_map and ("." not in name or hook.place_submodules):
            source = Source(hook.weights_map, name, torch.device(hook.execution_device), tensor.dtype)
            module, own = place_of(copied, name)
            table: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
            table[own] = Offloaded.of(source, tensor.shape)


def offloaded_in(model: nn.Module) -> Iterator[str]:
    """Yield the names of a copy's offloaded tensors."""
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            yield from (join(path, name) for name, tensor in table.items() if isinstance(tensor, Offloaded))
