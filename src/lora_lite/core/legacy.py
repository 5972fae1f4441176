"""Configs as they were written for version 0.1.0: the one place where they are turned into those of today.

There `init(W, generator, stats=None)` returned `(params, constants)`, and `needs` and `reads` said what `uses` says.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NEEDS = {"nothing": (), "product": ("matmul",)} | dict.fromkeys(("norms", "dense_init", "dense"), ("matmul", "dense"))
_READS = {"output": ("output",), "projection": ("output", "project"), "rows": ("output", "project", "vectors")}


@functools.cache
def completed(cls: Any, base: Any) -> Any:
    """Return a config's class completed by the defaults of `base`, with facts of the old form in today's.

    A class that lacks nothing is returned as it is; else the new one has its name, and `_written` is the user's own.
    """
    if "_written" in vars(cls):
        return cls
    bases: tuple[Any, ...] = (cls,) if issubclass(cls, base) else (cls, base)
    says: Mapping[str, Any] = next((vars(c) for c in cls.__mro__ if {"uses", "needs", "reads"} & set(vars(c))), {})
    members: dict[str, Any] = {}
    if says and "uses" not in says:
        members["uses"] = property(_uses)
    if _is_old(cls):
        bases = (_OldInit, *bases)
    if bases == (cls,) and not members:
        return cls
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduced, "_written": cls}
    if dataclasses.is_dataclass(cls):
        members |= {"__eq__": _equal, "__hash__": cls.__hash__}
    return type(cls.__name__, bases, members)


def _equal(cfg: Any, other: Any) -> bool:
    """Whether two configs are equal, of which either may have been completed."""
    return getattr(type(other), "_written", type(other)) is cfg._written and vars(cfg) == vars(other)


def _uses(cfg: Any) -> frozenset[str]:
    needs, reads = getattr(cfg, "needs", "nothing"), getattr(cfg, "reads", "rows")
    return frozenset((*_NEEDS.get(needs, (needs,)), *_READS.get(reads, (reads,))))  # a word that was never one is refused as such


def _is_old(cls: Any) -> bool:
    """Whether a class's `init` takes statistics, or says that it returns two trees."""
    try:
        signature = inspect.signature(cls.init)
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [p for p in signature.parameters.values() if p.kind in kinds]
    returned = signature.return_annotation
    return len(places) > 3 or str(returned).lower().startswith(("tuple[", "typing.tuple["))


class _OldInit:
    """The part of a class's completion that splits its `init` into the two jobs of today."""

    def constants(self, W: Any, generator: Any, stats: Any = None) -> Any:
        return self._both(W, generator, *(() if stats is None else (stats,)))[1]

    def init(self, W: Any, generator: Any) -> Any:
        return self._both(W, generator)[0]

    def _both(self, *given: Any) -> tuple[Any, Any]:
        found = super().init(*given)  # type: ignore[misc]
        return found if isinstance(found, tuple) else (found, MappingProxyType({}))


def _reduced(cfg: Any, protocol: int) -> tuple[Any, ...]:
    return _again, (cfg._written, dict(vars(cfg)))  # pickle finds the user's class by its name, not this one


def _again(cls: type, fields: Mapping[str, Any]) -> Any:
    from lora_lite.core.config import as_config

    cfg: Any = object.__new__(cls)
    vars(cfg).update(fields)
    return as_config(cfg)


def gives_of(says: Mapping[str, Any]) -> frozenset[str]:
    """Translate the `offers` and `reads` of a kind of version 0.1.0 into the words of `gives`."""
    offers = says.get("offers", tuple(_NEEDS))
    reads = says.get("reads", tuple(_READS))
    words = {word for said in offers for word in _NEEDS.get(said, (said,))} | {word for said in reads for word in _READS.get(said, (said,))}
    return frozenset(words | {"inputs", "dropout"})
