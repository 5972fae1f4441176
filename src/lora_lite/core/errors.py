"""Build the parts that error messages share: nearest names, bounded lists, the faults of a params tree."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

NO_ANSWER = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""The errors that say nothing about what ran: the same may run the next time."""


def listed(names: Iterable[object], limit: int = 6) -> str:
    """Quote the first `limit` names and count the rest."""
    names = list(names)
    shown = ", ".join(f'"{n}"' for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def exactly(path: str) -> str:
    """Return the regular expression of one path: the end alone, `1$`, is also that of layer 11."""
    return f"^{re.escape(path)}$"


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> str:
    """Quote the known names closest to `wanted`, or the first few where none is close."""
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(wanted, names, n=count, cutoff=0.3)
    return listed(close or names[:count])


def _leaf_fault(where: str, leaf: object, shape: tuple[int, ...]) -> str | None:
    if not isinstance(leaf, torch.Tensor):
        return f'"{where}": expected a tensor of shape {shape}, found {type(leaf).__name__}'
    if tuple(leaf.shape) != shape:
        return f'"{where}": expected shape {shape}, found {tuple(leaf.shape)}'
    if not leaf.is_floating_point():
        return f'"{where}": expected a floating dtype, found {leaf.dtype}'
    if not trainable(leaf.dtype):
        return f'"{where}": expected a floating dtype of 16 bits or more, found {leaf.dtype}; pass leaf.float()'
    return None


def trainable(dtype: torch.dtype) -> bool:
    """Whether params may have a dtype. In 8 bits their gradients would be cut off at its largest number, or lose their sign."""
    return dtype.is_floating_point and dtype.itemsize > 1


def tree_faults(tree: object, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
    """List everything in which a params tree departs from the expected paths, names and shapes."""
    if not isinstance(tree, Mapping):
        return [f"expected a mapping from target path to its tensors, found {type(tree).__name__}"]
    faults = [f'unexpected "{path}"' for path in tree if path not in shapes]
    for path, expected in shapes.items():
        leaves = tree.get(path)
        if not isinstance(leaves, Mapping):
            found = "nothing" if leaves is None else type(leaves).__name__
            faults.append(f'"{path}": expected a mapping with {listed(expected)}, found {found}')
            continue
        faults += [f'unexpected "{path}.{name}"' for name in leaves if name not in expected]
        for name, shape in expected.items():
            where = f"{path}.{name}"
            fault = _leaf_fault(where, leaves[name], shape) if name in leaves else f'missing "{where}"'
            faults += [fault] if fault else []
    return faults


def require_grads(call: str, params: Any, grads: Any) -> None:
    """Raise unless `grads` has the paths, names, shapes and devices of `params`, and both are floating.

    Raises:
        TypeError: where either is no params tree.
        ValueError: it lists each departure.
    """
    for name, tree in (("params", params), ("grads", grads)):
        require_tree(call, name, tree)
    shapes = {path: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for path, leaves in params.items()}
    faults = [f"in params {fault}" for fault in tree_faults(params, shapes)] + tree_faults(grads, shapes)
    for path, leaves in params.items() if not faults else ():
        for name, leaf in leaves.items():
            if (found := grads[path][name].device) != leaf.device:
                faults.append(f'"{path}.{name}": expected device {leaf.device}, found {found}')
    require_fitting(call, faults)


def require_fitting(call: str, faults: list[str]) -> None:
    """Raise a ValueError that lists in what gradients depart from params."""
    if faults:
        raise ValueError(
            f"{call.partition('(')[0]}: expected gradients that fit the params, found:\n{several(faults)}\n"
            "Pass what ll.value_and_grad(f)(params) returned for the same params."
        )


def require_tree(call: str, name: str, tree: object, expected: str = "a tree {target path: {name: tensor}}") -> None:
    """Raise a TypeError unless an argument is a params tree. The arguments are those of `require_type`."""
    if (fault := tree_fault(tree)) is not None:
        found = type(tree).__name__ + (f" with {fault}" if fault else "")
        raise TypeError(f"{call.partition('(')[0]}: expected {name} as {expected}, found {found}. Call {call}.")


def tree_fault(tree: object) -> str | None:
    """Return the place where an object is not laid out as `{target path: {name: tensor}}`: empty for all of it, None for nowhere."""
    if not isinstance(tree, Mapping):
        return ""
    for path, leaves in tree.items():
        if not is_mapping(leaves):
            return f'{type(leaves).__name__} at "{path}"'
        for name, leaf in leaves.items():
            if is_mapping(leaf):
                return f'a tree at "{path}", which has to be passed by itself'
            if not isinstance(leaf, torch.Tensor):
                return f'{type(leaf).__name__} at "{path}" "{name}"'
    return None


def is_mapping(value: Any) -> bool:
    """Whether a value is a mapping, or used as one, as `nn.ParameterDict` is."""
    return isinstance(value, Mapping) or (hasattr(value, "items") and hasattr(value, "values"))


def require_targets(call: str, found: object, variant: str) -> None:
    """Raise a ValueError where a tree has no target of a variant."""
    if not found:
        raise ValueError(f"{call}: expected params of {variant} in the tree, found none. Pass the tree of an adapt that has such targets.")


def require_one_map(call: str, maps: Any, names: Iterable[str], axes: Mapping[str, int], more: str = "") -> None:
    """Raise a ValueError where linear maps have leading axes, as those of a stack: `axes` are the leaves' own, `more` another way out."""
    for where in names:
        for name, count in axes.items():
            if maps[where][name].dim() != count:
                raise ValueError(
                    f'{call}: expected params of one linear map at each target, found "{where}" "{name}" of shape '
                    f"{tuple(maps[where][name].shape)}. Update each of ll.unstack(stacked) with a state of its own. {more}".rstrip()
                )


def require_type(ok: bool, call: str, name: str, expected: str, value: object) -> None:
    """Raise a TypeError unless an argument is what a call takes: of arguments in another order, too.

    Args:
        ok: whether it is.
        call: the call as it should be written, e.g. "save(adapt, params, path)".
        name: the argument's name.
        expected: what it should be, with its article.
        value: what it is.
    """
    if not ok:
        raise TypeError(f"{call.partition('(')[0]}: expected {name} as {expected}, found {type(value).__name__}. Call {call}.")


def several(faults: list[str], limit: int = 12) -> str:
    """Lay out faults one a line."""
    lines = [f"  - {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  - and {len(faults) - limit} more")
    return "\n".join(lines)
