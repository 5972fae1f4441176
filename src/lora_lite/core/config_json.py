"""Configs as plain values: written to files, read back, and held against each other."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch

from lora_lite.core.config import AdapterConfig, as_config
from lora_lite.core.errors import listed
from lora_lite.core.fields import at


def to_json(cfg: AdapterConfig) -> dict[str, Any]:
    """Return a config as plain values: its variant's name, every field and every other attribute of the instance but cached properties.

    Raises:
        TypeError: for a value that JSON cannot hold.
    """
    others = (name for name in vars(cfg) if not isinstance(getattr(type(cfg), name, None), functools.cached_property))
    names = [*(f.name for f in dataclasses.fields(cfg)), *others]
    fields = {name: getattr(cfg, name) for name in names}
    fields |= {name: str(value).removeprefix("torch.") for name, value in fields.items() if isinstance(value, torch.dtype)}
    for name, value in fields.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"{at(cfg, name)} a value that a file can hold, found {value!r} ({e}). Keep the name of it in the field."
            ) from e
    return {**fields, "name": cfg.name}


def to_file(cfg: AdapterConfig) -> dict[str, Any]:
    """Return a config as plain values, of which `from_json` makes an equal one.

    Raises:
        TypeError: where it does not, so that a loaded adapter would compute something else, or could not be loaded.
    """
    values = to_json(cfg)
    try:
        again = from_json(type(cfg), json.loads(json.dumps(values)))
    except (TypeError, ValueError) as e:
        raise TypeError(f"{type(cfg).__name__}: expected a config that its fields make again, found one that they do not ({e}).") from e
    for name in [name for name in values if not hasattr(AdapterConfig, name)]:  # what all configs share is of plain types
        own, found = getattr(cfg, name), getattr(again, name, None)
        if not _alike(own, found):
            raise TypeError(
                f"{at(cfg, name)} a value that comes back from a file, found {own!r}, which comes back as {found!r}. Use strings for the "
                "keys of a dict, and the name of a dtype in the place of it."
            )
    return values


def _alike(own: Any, found: Any) -> bool:
    """Whether two values are the same but for the sort of a sequence; JSON has one."""
    if isinstance(own, list | tuple) and isinstance(found, list | tuple):
        return len(own) == len(found) and all(map(_alike, own, found))
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        return own.keys() == found.keys() and all(_alike(value, found[key]) for key, value in own.items())
    return bool(own == found or (own != own and found != found))  # nan is not equal to itself


def departures(own: AdapterConfig, other: AdapterConfig) -> list[str]:
    """List the fields in which `other` would make another function of the same params than `own`, or the variant where that is another.

    A tree's shapes say its rank, but not its `alpha`. Left out are the fields that all configs share, since the tree itself says where a
    variant acts and in which dtype, and dropouts, which are no part of the trained function.
    """
    if own is other:
        return []
    if (own.name, type(own).__name__) != (other.name, type(other).__name__):
        return [f"{type(own).__name__}, {type(other).__name__} there"]
    dropouts = (f.name for f in dataclasses.fields(own) if "dropout" in f.name)  # rank_dropout_scale among them
    left_out = {*dropouts, *(f.name for f in dataclasses.fields(AdapterConfig))}
    here, there = (json.loads(json.dumps({k: v for k, v in to_json(cfg).items() if k not in left_out})) for cfg in (own, other))
    fields = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [f"{type(own).__name__}.{name}={here.get(name)!r}, {there.get(name)!r} there" for name in fields]


def from_json(cls: type, fields: Mapping[str, Any]) -> AdapterConfig:
    """Build a config of `cls` from the values that `to_json` returned.

    Raises:
        ValueError: for a field that `cls` does not take.
    """
    cls = getattr(cls, "_written", cls)  # the user's own class, where as_config completed it
    made = {f.name for f in dataclasses.fields(cls) if not f.init} if dataclasses.is_dataclass(cls) else set()
    values = {k: _tuples(v) for k, v in fields.items() if k != "name" and k not in made}
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(values)
    if not issubclass(cls, AdapterConfig):  # its shared fields are the defaults, not its own
        values = {k: v for k, v in values.items() if k in known and not hasattr(AdapterConfig, k)}
    unknown = [k for k in values if k not in known]
    if unknown:
        raise ValueError(
            f"{cls.__name__}: expected the fields {listed(sorted(known), 20)}, found also {listed(unknown)}. "
            "Load the file with the version that wrote it."
        )
    return as_config(cls(**values))


def _tuples(value: Any) -> Any:
    """Return a value with tuples for its lists, those inside of others too: a config can be a key of a dict."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
