"""The params of a bound copy as a tree: checked, read and written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.adapter import adapters
from lora_lite.clone.reads import bindings
from lora_lite.core.config_json import departures
from lora_lite.core.errors import is_mapping, listed, several, trainable, tree_faults
from lora_lite.core.plan import Entries, Plan, Shapes
from lora_lite.core.tree import AnyTree, Tree
from lora_lite.layers.kind import Params


def require_fit(params: Any, shapes: Shapes, caller: str, on_meta: bool = False) -> torch.dtype | None:
    """Refuse a params tree of other paths, names or shapes, or without data where the model has some.

    Returns:
        The dtype of all leaves, None where there are several.

    Raises:
        ValueError: it lists each departure.
        RuntimeError: for params on meta, which products on a CPU take without a word.
    """
    try:
        found = dtypes(params, shapes)
        if found is not None:
            return found.pop() if len(found) == 1 else None
    except (KeyError, IndexError, TypeError, AttributeError):
        pass  # whatever is wrong is found again below, and named
    faults = tree_faults(params, shapes)
    if not faults:
        empty = next(path for path, leaves in params.items() for leaf in leaves.values() if leaf.is_meta)
        if on_meta:
            return None
        raise RuntimeError(
            f'{caller}: expected params with data at "{empty}", found them on meta. Pass params on its device; where the model recomputes '
            "blocks by a checkpoint of its own, leave that to build(..., remat=) instead."
        )
    raise ValueError(f"{caller}: expected params that fit this model and config, found:\n{several(faults)}\n{_way(params, shapes)}")


def _way(params: Any, shapes: Shapes) -> str:
    """Return the way out for params that do not fit: what else takes a stack of fitting ones, or where fitting ones come from."""
    given = [
        (params[path].get(name), shape)
        for path, names in shapes.items()
        if is_mapping(params) and is_mapping(params.get(path))
        for name, shape in names.items()
    ]
    lengths = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[1:] == shape else 0 for leaf, shape in given}
    if len(given) == sum(map(len, shapes.values())) and len(lengths) == 1 and 0 not in lengths:
        return f"They are a stack of {lengths.pop()}: run it by adapt.mixed(stacked, batch), or take a member of ll.unstack(stacked)."
    return "Use adapt.init(...), or load(...) with the file that the params were saved to."


FLOATING = frozenset(dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and trainable(dtype))


def dtypes(params: AnyTree, shapes: Shapes) -> set[torch.dtype] | None:
    """Return the dtypes of a params tree that has these paths, names and shapes, and data; None for one that has not.

    Plain loops: every call passes here, with hundreds of targets.
    """
    if len(params) != len(shapes):
        return None
    last, found = None, set()  # the dtype is nearly always that of the leaf before
    for path, expected in shapes.items():
        leaves = params[path]
        if len(leaves) != len(expected):
            return None
        for name, shape in expected.items():
            leaf = leaves[name]
            if leaf.shape != shape or leaf.is_meta:
                return None
            if leaf.dtype is not last:
                last = leaf.dtype
                if last not in FLOATING:
                    return None
                found.add(last)
    return found


def read_params(module: nn.Module, shapes: Shapes, get: Callable[[Tensor], Tensor]) -> Tree:
    """Read a params tree out of a bound module.

    Raises:
        AttributeError: where the module lacks a target's params.
    """
    held = params_in(module)
    for path in shapes:
        if path not in held:
            raise AttributeError(f"no adapter of {path!r}")
    return {path: {name: get(held[path][name]) for name in names} for path, names in shapes.items()}


def params_of(plan: Plan, module: nn.Module) -> Tree:
    """Read detached copies of the params out of a module that was made from a plan.

    Raises:
        ValueError: where it was not, or under other configs.
    """
    try:
        found = read_params(module, plan.shapes, whole)
    except AttributeError as e:
        raise ValueError(
            f"adapt.params: expected a module made by this adapt.module(params), found {type(module).__name__} without its "
            f"params ({e}). Pass the module itself, not the model it was built from."
        ) from e
    require_configs(module, plan.entries)
    return found


def require_configs(module: nn.Module, entries: Entries) -> None:
    """Refuse a bound module whose targets have other configs, under which its params mean another update.

    Raises:
        ValueError: it names the fields.
    """
    bound = bindings(module)
    for path, own, its in ((target.path, cfg, bound[target.path].cfg) for target, cfg in entries if target.path in bound):
        if its != own and (differ := departures(own, its)):
            raise ValueError(
                f'adapt.params: expected a module made by this adapt.module(params), found one of another config at "{path}": '
                f"{listed(differ)}. Its params mean another update here: read them with the adapt that made it."
            )


@torch.no_grad()
def write_params(module: nn.Module, params: AnyTree) -> None:
    """Write the values of a params tree into a bound module, in place."""
    held = params_in(bare(module))
    for path, leaves in params.items():
        for name, leaf in leaves.items():
            held[path][name].copy_(leaf)


def params_in(module: nn.Module) -> dict[str, Params]:
    """Return the parameters of a bound module's adapters as a params tree."""
    return {adapter.path: adapter.params() for adapter in adapters(module)}


def bare(module: nn.Module) -> nn.Module:
    """Take off the wrappers of DDP, DataParallel and `torch.compile`."""
    while True:
        wrapper = "module" if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel) else "_orig_mod"
        inner = getattr(module, wrapper, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def whole(param: Tensor) -> Tensor:
    """Copy a param out of a module. A param that FSDP2 has split is gathered, by all processes together."""
    param = param.detach()
    return param.full_tensor() if hasattr(param, "full_tensor") else param.clone()
