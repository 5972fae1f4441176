"""The layers that a PEFT config names."""

import re
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any

from lora_lite.core.errors import listed


def named(fields: Mapping[str, Any], paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the paths that PEFT adapts by `target_modules`, in order, and what hinders an answer."""
    wanted, others = fields.get("target_modules"), fields.get("exclude_modules") or []
    if not wanted or wanted == "all-linear":
        return [], [f"target_modules: expected names or an expression, since the file has no tensors of a layer, found {wanted!r}"]
    if fields.get("layers_to_transform") is not None:
        return [], [
            f"layers_to_transform: expected none, since the file has no tensors of a layer, found {fields['layers_to_transform']!r}"
        ]
    whole = [rf"(^|.*\.){name}($|\..*)" for name in fields.get("modules_to_save") or []]
    return [p for p in paths if _fits(wanted, p) and not _fits(others, p) and not any(re.match(name, p) for name in whole)], []


def _fits(names: Any, path: str) -> bool:
    """Whether an expression matches a path in full, or one of several names is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def warn_of_absent(fields: Mapping[str, Any], paths: Iterable[str], present: Container[str]) -> None:
    """Warn of layers that `target_modules` names and of which the file has no tensors: a part of it may be missing."""
    absent = [path for path in named(fields, paths)[0] if path not in present]
    if absent:
        warnings.warn(
            f"from_peft: target_modules names {listed(absent)} too, of which the file has no tensors. They stay as the model has them. If "
            "the training adapted them, save the adapter again: a part of it is missing.",
            stacklevel=4,
        )


def expression(paths: Iterable[str]) -> str:
    """Return an expression of these paths and no others: PEFT matches one in full."""
    return "|".join(map(re.escape, paths))


def listed_or_expressed(paths: list[str], others: Iterable[str] | None) -> list[str] | str:
    """Return the layers as a list, which other readers of these files expect, or as an expression where a suffix would match others.

    So it might where the other paths are not known, which None stands for."""
    ends = tuple(f".{path}" for path in paths)
    return expression(paths) if paths and (others is None or any(path.endswith(ends) for path in others)) else paths
