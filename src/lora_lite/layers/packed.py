"""Base of the kinds of other libraries' packed layers: how such a layer is recognised, and how its codes are unpacked."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lite.layers.quantised import FrozenQuantised


class PackedKind(FrozenQuantised):
    """A packed layer of a library that stays optional: it is recognised by the class that its forward is of.

    A subclass of such a layer with a forward of its own is another layer, such as a grouped one, and is not read.
    """

    library: ClassVar[str]
    """The package in which the class is defined."""
    told_by: ClassVar[frozenset[str]]
    """The names of the class, or `module.name` where the library has several of one name."""

    @classmethod
    def may_fit(cls, of: type[nn.Module]) -> bool:
        package, *names = _of_forward(of)
        return f"{package}.".startswith(f"{cls.library}.") and not cls.told_by.isdisjoint(names)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return cls.may_fit(type(layer))  # also where another base has a rule of its own


def _of_forward(cls: Any) -> tuple[str, str, str]:
    """Return the module of the class that a module's forward is of, its name, and its name after that of its file."""
    owner = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
    return owner.__module__, owner.__name__, f"{owner.__module__.rpartition('.')[2]}.{owner.__name__}"


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack codes of `bits` bits from integers, the lowest bits first: `(n, *rest) -> (n * width // bits, *rest)`, in int32.

    The codes follow one another without a gap, from one integer into the next.
    """
    width = 8 * words.dtype.itemsize
    start = torch.arange(words.shape[0] * width // bits, device=words.device) * bits
    word, shift = start // width, (start % width).view(-1, *[1] * (words.dim() - 1))
    wide = words.long() & (1 << width) - 1  # the sign bit is a bit as others
    codes = wide[word] >> shift
    if width % bits:
        codes = codes | wide[(word + 1).clamp(max=len(wide) - 1)] << width - shift
    return (codes & (1 << bits) - 1).int()
