"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` as a kind of target: a linear map of patches, `W (o, i)` with `i = channels * prod(kernel)`.

A variant that reads its input only by `W.project` gets the input as it is: `A x` is a convolution with the layer's own kernel, stride,
padding and dilation to `r` channels. Any other gets the patches as rows, which take `prod(kernel) / prod(stride)` of the input's memory.
Outputs have their channels last inside a variant and where the model expects them outside.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lite.core.autocast import autocasts
from lora_lite.core.frozen import Frozen
from lora_lite.layers.access import first_of
from lora_lite.layers.identity import exact_dtype, laid_out_as
from lora_lite.layers.kind import Kind, Params, Run, Variant

CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STEPS = ("forward", "_conv_forward", "_output_padding")
"""The methods in which a convolution computes. A class, or a user who tiles images, may replace each."""
_CONVS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


class ConvKind(Kind):
    """A convolution whose outputs see all channels: `x` is `(*b, channels, *space)`."""

    classes: ClassVar[tuple[type[nn.Module], ...]] = CLASSES
    by_name: ClassVar[bool] = True
    gives: ClassVar[AbstractSet[str]] = Kind.gives - {"inputs", "positions"}
    why: ClassVar[str] = "Its inputs are images: calibration does not see their patches, and they have no positions of a text."

    @classmethod
    def fits(cls, layer: Any) -> bool:
        return cls.may_fit(type(layer)) and layer.groups == 1

    @classmethod
    def faithful(cls, layer: nn.Module) -> bool:
        of, set_on = type(layer), vars(layer)
        return "_conv_forward" not in set_on and any(all(getattr(of, m, None) is getattr(c, m, None) for m in _STEPS) for c in cls.classes)

    @property
    def _dims(self) -> int:
        return len(self.layer.kernel_size)

    @property
    def _kernel(self) -> tuple[int, ...]:
        """The size of the kernel that the layer has: one that was put in place may have another than `kernel_size`."""
        return tuple(self.layer.weight.shape[2:])

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.flatten(1)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve by another kernel, with the layer's stride and padding. The result has channels last."""
        layer = self.layer
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = self._padded(x), 0
        y = _CONVS[self._dims - 1](x, kernel, bias, layer.stride, padding, layer.dilation, layer.groups)
        return y.movedim(-self._dims - 1, -1)

    def _padded(self, x: Tensor) -> Tensor:
        mode = self.layer.padding_mode
        return F.pad(x, self.layer._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve: `(*b, channels, *space)` to `(*b, *space, o)`."""
        return self._convolve(x, self.layer.weight, self.layer.bias)

    def matmul(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.layer.weight)

    def project(self, x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
        return self._convolve(self.dropped(x, dropout), A.view(len(A), *self.layer.weight.shape[1:]))

    def vectors(self, x: Tensor) -> Tensor:
        return torch.empty((1, self.in_features), dtype=x.dtype, device="meta").expand(*self._space(x), -1)

    def _space(self, x: Tensor) -> tuple[int, ...]:
        """Return the output's axes without its channels."""
        layer, d = self.layer, self._dims
        pads = layer._reversed_padding_repeated_twice
        around = [pads[2 * k] + pads[2 * k + 1] for k in reversed(range(d))]
        sizes = zip(x.shape[-d:], around, layer.dilation, self._kernel, layer.stride)
        return (*x.shape[: -d - 1], *((n + p - dil * (k - 1) - 1) // step + 1 for n, p, dil, k, step in sizes))

    def apply(self, f: Variant, params: Params, x: Tensor) -> Tensor:
        if "vectors" not in f.uses:
            return f(params, self, x)
        patches = self.patches(x)
        return f(params, _Patched(self, x, patches), patches)

    def patches(self, x: Tensor) -> Tensor:
        """Return the patch that each output sees: `(*b, *space, i)`."""
        layer, first = self.layer, x.dim() - self._dims  # the first axis of space
        x = self._padded(x)
        for k, (size, step, dilation) in enumerate(zip(self._kernel, layer.stride, layer.dilation)):
            x = x.unfold(first + k, dilation * (size - 1) + 1, step)[..., ::dilation]
        return x.movedim(first - 1, first - 1 + self._dims).flatten(first - 1 + self._dims)

    def call(self, run: Run, own: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        y: Tensor = run(self, first_of(args, kwargs))
        return y.movedim(-1, -self._dims - 1).contiguous()  # models call `view` on a convolution's output

    def original(self, weights: Mapping[str, Tensor], path: str) -> tuple[str, Tensor | None]:
        name, weight = super().original(weights, path)
        return name, None if weight is None else weight.flatten(1)

    def to_weight(self, dense: Tensor) -> Tensor:
        return dense.reshape(self.layer.weight.shape)


class GroupedConvKind(ConvKind):
    """A convolution in groups: `W (o, i)` with `i = channels / groups * prod(kernel)`, of which each group of outputs has its rows.

    A row sees the channels of its own group, so that no one input goes with all rows. The variant is evaluated at the identity instead, as
    where merging, and the layer convolves by the kernel that it returns. So is one that uses the output alone: it may mix the outputs of
    several groups, of which no kernel has the result.
    """

    gives: ClassVar[AbstractSet[str]] = ConvKind.gives - {"dropout"}
    why: ClassVar[str] = (
        "Its kernel is adapted as one matrix: there is no input to drop. Calibration sees images, not patches, which have no positions of "
        "a text."
    )
    sees_inputs: ClassVar[bool] = False

    @classmethod
    def fits(cls, layer: Any) -> bool:
        return cls.may_fit(type(layer)) and layer.groups > 1

    def apply(self, f: Variant, params: Params, x: Tensor) -> Tensor:
        """Convolve by the adapted kernel. In low precision the update has a convolution of its own: its digits would be lost in a sum."""
        dtype = exact_dtype(x.dtype)
        weight, bias = (self.adapted(f, params, role, dtype) for role in ("weight", "bias"))
        if dtype == x.dtype == self.dtype and not autocasts(x):
            return self._convolve(x, laid_out_as(self.layer.weight, self.to_weight(weight)), bias)
        own = 0.0 if self.bias is None else self.bias.detach().to(dtype)
        update = self._convolve(x, self.to_weight(weight - self.dense(dtype)).to(x.dtype))
        return self(x) + update + (bias - own).to(update.dtype)


class _Patched(Frozen):
    """A convolution as a linear map of patches. For the patches of the layer's input it runs the layer's own convolution."""

    def __init__(self, conv: ConvKind, x: Tensor, patches: Tensor) -> None:
        super().__init__(conv.weight, conv.bias, conv.constants, conv.training)
        self._conv, self._x, self._patches = conv, x, patches

    def __call__(self, x: Tensor) -> Tensor:
        return self._conv(self._x) if x is self._patches else super().__call__(x)

    def matmul(self, x: Tensor) -> Tensor:
        return self._conv.matmul(self._x) if x is self._patches else super().matmul(x)

    def dropped(self, x: Tensor, dropout: float) -> Tensor:
        """Drop entries of the layer's input, as `project` does: one of them is missing in all patches that have it."""
        drops = x is self._patches and dropout and self.training
        return self._conv.patches(self._conv.dropped(self._x, dropout)) if drops else super().dropped(x, dropout)
