"""Whether somebody writes to tensors, which count their changes."""

from collections.abc import Callable, Mapping

from torch import Tensor

from lora_lite.core.errors import listed


def written(tensors: Mapping[str, Tensor]) -> Callable[[], str]:
    """Note the state of tensors by name. Return a function that quotes the names of those that were written to since."""
    known = [(name, t, t._version) for name, t in tensors.items() if not t.is_inference()]
    return lambda: listed(name for name, t, version in known if t._version != version)
