"""Norms: modules that are moved by a variant of their weight."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

from lora_lite.layers.module import ModuleKind


class NormKind(ModuleKind):
    """A norm with a trainable weight, recognised by its class's name, since each model family has classes of its own."""

    site: ClassVar[str] = "norm"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return is_norm(layer)

    @classmethod
    def places(cls, path: str, module: nn.Module, linear: Callable[[nn.Module], Any]) -> Iterator[str]:
        if cls.fits(module):
            yield path


def is_norm(layer: nn.Module) -> bool:
    """Whether a module is a norm with a trainable weight. A buffer of that name is none."""
    return "norm" in type(layer).__name__.lower() and layer._parameters.get("weight") is not None and not list(layer.children())
