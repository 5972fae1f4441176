"""`nn.ConvTranspose1d`, `2d` and `3d` as a kind of target: `W (o, i)` with `i = channels / groups * prod(kernel)`.

A row of `W` has all that an output channel sees, as a row of a convolution's does, so that gates, magnitudes and norms mean the same. A
variant that reads its input only by `W.project` gets the input as it is: `A x` is a transposed convolution to `r` channels. For any other,
and in groups, the kernel is adapted as one matrix.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.core.tree import join
from lora_lite.layers.convolution import GroupedConvKind
from lora_lite.layers.kind import Params, Run, Variant

CLASSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class TransposedConvKind(GroupedConvKind):
    """A transposed convolution, in groups or not: `x` is `(*b, channels, *space)`."""

    classes: ClassVar[tuple[type[nn.Module], ...]] = CLASSES
    output_size: ClassVar[Any] = None
    """The size that the model's call asks for; None for the layer's own."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer))

    @property
    def weight(self) -> Tensor:
        return self._rows(self.layer.weight)

    def _rows(self, kernel: Tensor) -> Tensor:
        """Return a kernel `(channels, o / groups, *size)` as `(o, i)`."""
        return kernel.unflatten(0, (self.layer.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def to_weight(self, dense: Tensor) -> Tensor:
        groups, (channels, _, *size) = self.layer.groups, self.layer.weight.shape
        return dense.reshape(groups, -1, channels // groups, *size).transpose(1, 2).flatten(0, 1)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        layer, d = self.layer, self._dims
        y = _CONVS[d - 1](x, kernel, bias, layer.stride, layer.padding, self._extra(x), layer.groups, layer.dilation)
        return y.movedim(-d - 1, -1)

    def _extra(self, x: Tensor) -> Sequence[int]:
        """Return the padding of the output on one side, as the layer's own forward finds it."""
        layer = self.layer
        if self.output_size is None:
            return tuple(layer.output_padding)
        sizes = (layer.stride, layer.padding, layer.kernel_size, self._dims, layer.dilation)
        return tuple(layer._output_padding(x, self.output_size, *sizes))

    def _space(self, x: Tensor) -> tuple[int, ...]:
        layer, d = self.layer, self._dims
        sizes = zip(x.shape[-d:], layer.stride, layer.padding, layer.dilation, self._kernel, self._extra(x))
        return (*x.shape[: -d - 1], *((n - 1) * step - 2 * p + dil * (k - 1) + e + 1 for n, step, p, dil, k, e in sizes))

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        return self._convolve(x, A.view(len(A), *self.layer.weight.shape[:1], *self._kernel).transpose(0, 1))

    def apply(self, f: Variant, params: Params, x: Tensor) -> Tensor:
        if self.layer.groups == 1 and not {"vectors", "rows"} & set(f.uses):
            return f(params, self, x)
        return super().apply(f, params, x)

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        W = self
        if size is not None:
            W = copy.copy(self)
            vars(W)["output_size"] = list(size)
        y: Tensor = run(W, args[0] if args else kwargs["input"])
        return y.movedim(-1, -self._dims - 1).contiguous()

    def original(self, weights: Mapping[str, Tensor], path: str) -> tuple[str, Tensor | None]:
        name = join(path, "weight")
        weight = weights.get(name)
        return name, None if weight is None else self._rows(weight)
