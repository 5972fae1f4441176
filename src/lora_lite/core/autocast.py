"""torch's autocast: whether it is on, how to leave it, put it in place again, and have it under `vmap`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Autocast = dict[str, tuple[torch.dtype, bool]]
"""The state of autocast by type of device: its dtype, and whether it is on."""

_AS_IT_IS = nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    return torch.is_autocast_enabled(_device(x))


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast leaves the dtypes of small products and solves alone."""
    return torch.autocast(_device(x), enabled=False) if autocasts(x) else _AS_IT_IS


def _device(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # autocast knows no meta device


def autocast_state() -> Autocast:
    """Return the present state of autocast for the CPU and the accelerator, if any."""
    accelerator = torch.accelerator.current_accelerator()
    known = accelerator is not None and torch.amp.is_autocast_available(accelerator.type)
    devices = ("cpu", accelerator.type) if accelerator is not None and known else ("cpu",)
    return {device: (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in devices}


@contextmanager
def autocast_as(state: Autocast) -> Iterator[None]:
    """Put a state of autocast in place, to compute again: a backward pass runs outside of the context that stood around the forward.

    Casts are not cached. The inputs of a recomputation are leaves, of which autocast would keep one cast for all uses, and add up the
    gradients of these in the narrow dtype.
    """
    now = autocast_state()
    with ExitStack() as stack:
        for device, (dtype, on) in state.items():
            if on or now[device] != state[device]:
                stack.enter_context(torch.autocast(device, dtype, on, cache_enabled=False))
        yield


def narrowed(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the products that autocast narrows are narrow under `vmap` too, where torch forgets it for some."""
    return _Narrowed() if autocasts(x) else _AS_IT_IS


class _Narrowed(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y.to(torch.get_autocast_dtype(_device(y))) if func in _FORGOTTEN and y.dtype == torch.float32 and autocasts(y) else y


_FORGOTTEN = frozenset(
    {
        *(F.linear, torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, F.scaled_dot_product_attention),
        *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
"""The products that torch's rules for `vmap` take apart below autocast: a product is narrowed there, and the sum with a bias is not."""
