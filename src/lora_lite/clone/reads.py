"""The bindings of a copy, and the parameters that the model reads adapted: whoever reads one finds what its binding gives."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lite.clone.adapter import adapters
from lora_lite.clone.listing import show_lists
from lora_lite.core.tracing import while_traced
from lora_lite.layers.access import HOST, ReadTensor, place_of

if TYPE_CHECKING:
    from lora_lite.clone.bind import Binding


def bindings(module: nn.Module) -> dict[str, "Binding"]:
    """Return the bindings of a bound copy by the path of their target."""
    return {a.binding.path: a.binding for a in adapters(module) if a.binding is not None}


def show_reads(root: nn.Module) -> None:
    """Let whoever reads a parameter of a bound copy find the adapted one."""
    for binding, module, own, name in _reads(root):
        vars(module)[own] = ReadTensor.of(binding, name)
    show_lists(root, bindings(root).values())


def hide_reads(root: nn.Module) -> None:
    """Let whoever reads a parameter find the frozen one until the first call: FSDP2 looks for it when that begins."""
    if _HIDDEN in vars(root):
        return
    for _, module, own, _ in _reads(root):
        vars(module).pop(own, None)
    vars(root)[_HIDDEN] = root.register_forward_pre_hook(_show_again)  # FSDP2 puts its own hook before


def _reads(root: nn.Module) -> Iterator[tuple["Binding", nn.Module, str, str]]:
    """Yield each parameter that is adapted where the model reads it: its binding, the module, its name there and in the target."""
    for leader in bindings(root).values():
        for binding in (leader, *leader.followers):
            for name in leader.W.readable():
                module, own = place_of(vars(binding.W.layer)[HOST], name)
                yield binding, module, own, name


def key_of(path: str) -> str:
    """Return a name for a binding, which the compiler takes for a constant."""
    return f"{path} {next(_COUNT)}"


@while_traced
def note_traced(key: str, name: str) -> None:
    """Note, where the compiler traces, that the model has read a parameter adapted."""
    _TRACED[key] = tuple({*_TRACED.get(key, ()), name})


@while_traced
def noted(key: str) -> tuple[str, ...]:
    """Return the names that were noted. They stay for the next trace, which the compiler may begin again."""
    return _TRACED.get(key, ())


def forget_traced(key: str) -> None:
    """Begin a trace, in which the model has read nothing yet."""
    _TRACED.pop(key, None)


_COUNT = itertools.count()
_TRACED: dict[str, tuple[str, ...]] = {}


def _show_again(root: nn.Module, args: Any) -> None:
    vars(root).pop(_HIDDEN).remove()
    show_reads(root)


_HIDDEN = "_lora_lite_hidden"
