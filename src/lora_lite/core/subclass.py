"""Classes that the modules of a clone take: subclasses under the name of the class that they come from.

pickle finds a class by its name, and would find the one that they come from. So a module says from which class its own is made and by what.
"""

from collections.abc import Callable
from typing import Any

_MADE = "_lora_lite_made"


def derived(maker: Callable[[Any], Any], cls: Any, part: type | None = None, **members: Any) -> Any:
    """Make a subclass of `cls` under its name.

    Args:
        maker: the function of a module that gives this subclass for `cls`, always the same one.
        cls: the class of a module.
        part: what comes before `cls` in the order of methods.
        members: of the class besides.
    """
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduced, _MADE: (maker, cls)}
    return type(cls.__name__, (cls,) if part is None else (part, cls), members)


def _reduced(module: Any, protocol: int) -> tuple[Any, ...]:
    makers, cls = [], type(module)
    while _MADE in vars(cls):
        maker, cls = vars(cls)[_MADE]
        makers.append(maker)
    parts: tuple[Any, ...] = tuple(object.__reduce_ex__(module, max(protocol, 2)))
    return _empty, (cls, *reversed(makers)), *parts[2:]  # in place of the class and its arguments


def _empty(cls: Any, *makers: Callable[[Any], Any]) -> Any:
    for maker in makers:
        cls = maker(cls)
    return cls.__new__(cls)
