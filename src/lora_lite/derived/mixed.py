"""Mixed batches: stacks of params trees, and which member each row takes.

Only a variant's pure function is vmapped, at each target, over the adapters; everything else sees one ordinary batch. So it works wherever
the model does, with padding masks and fused attention that a whole-model `vmap` cannot run.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Params
from lora_lite.core.plan import Plan, Shapes
from lora_lite.core.tracing import in_transform, require_values
from lora_lite.core.tree import AnyTree, Tree, tree_map
from lora_lite.layers.kind import Kind


def stack_trees(trees: Sequence[AnyTree]) -> Tree:
    """Stack params trees of the same keys and shapes along a leading adapter axis.

    Raises:
        ValueError: where they differ.
    """
    for k, tree in enumerate(trees):
        fault = _difference(trees[0], tree)
        if fault:
            where, found, first = fault
            raise ValueError(
                f"stack: expected trees with the same keys, shapes and devices, found tree {k} to differ from tree 0 at {where}: found "
                f"{found}, and {first} in tree 0. Stack trees of one adapt, or build each adapter with the same targets and ranks; "
                "pad=True pads ranks."
            )
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def unstack_tree(stacked: AnyTree) -> list[Tree]:
    """Split a stacked tree into its members."""
    members = stacked_size(stacked)
    return [tree_map(lambda leaf, k=k: leaf[k], stacked) for k in range(members)]


def stacked_size(stacked: AnyTree) -> int:
    """Return the length of the adapter axis.

    Raises:
        ValueError: where the leaves have none in common.
        TypeError: where it is no tree.
    """
    if not isinstance(stacked, Mapping):
        found = type(stacked).__name__
        raise TypeError(f"stack: expected a stack of params trees, found {found}. Make it with ll.stack([params, ...]).")
    odd = next((leaves for leaves in stacked.values() if not hasattr(leaves, "values")), None)
    if odd is not None:
        raise TypeError(
            f"stack: expected a stack of params trees, found a {type(stacked).__name__} of {type(odd).__name__}. Make it with "
            "ll.stack([params, ...])."
        )
    if all(isinstance(leaf, Tensor) for leaves in stacked.values() for leaf in leaves.values()):
        try:  # `len`: under torch.jit.trace an entry of the shape is a tensor
            lengths = {len(leaf) if leaf.dim() else 0 for leaves in stacked.values() for leaf in leaves.values()}
        except TypeError:  # a symbol has no hash
            require_values(leaf for leaves in stacked.values() for leaf in leaves.values())
            raise
        if len(lengths) == 1 and 0 not in lengths:
            return lengths.pop()
    raise ValueError(_not_stacked(stacked))


def _not_stacked(stacked: AnyTree) -> str:
    leaves = {(path, name): leaf for path, leaves in stacked.items() for name, leaf in leaves.items()}
    sizes = {at: leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else 0 for at, leaf in leaves.items()}
    common = next(iter(sizes.values()), 0)
    odd = next((at for at, size in sizes.items() if size == 0 or size != common), None)
    first = next(iter(leaves), None)
    beside = "" if odd is None or first is None or first == odd else f", and {_shape(leaves[first])} at {place_of_leaf(*first)}"
    found = "none" if odd is None else f"{_shape(leaves[odd])} at {place_of_leaf(*odd)}{beside}"
    return (
        f"stack: expected leaves with one leading adapter axis, found {found}; lengths {sorted(set(sizes.values()))}. Make them with "
        "ll.stack([params, ...])."
    )


def place_of_leaf(path: str, name: str) -> str:
    """Quote the path and the name of a leaf."""
    return f'"{path}" "{name}"'


def _shape(leaf: object) -> str:
    return str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__


def _difference(first: AnyTree, tree: AnyTree) -> tuple[str, str, str] | None:
    """Return where a tree first departs from another, and what stands there in it and in the other; None where nowhere."""
    for path in [*first, *(p for p in tree if p not in first)]:
        if path not in tree or path not in first:
            found, other = ("a target" if path in t else "nothing" for t in (tree, first))
            return f'"{path}"', found, other
        for name in [*first[path], *(n for n in tree[path] if n not in first[path])]:
            a, b = (_shape(t[path][name]) if name in t[path] else "nothing" for t in (first, tree))
            if a != b:
                return place_of_leaf(path, name), b, a
            there, here = (t[path][name].device if isinstance(t[path][name], Tensor) else None for t in (first, tree))
            if there != here:
                return place_of_leaf(path, name), f"device {here}", str(there)
    return None


def member_shapes(shapes: Shapes, members: int) -> Shapes:
    """Return the shapes that the leaves of a stacked tree must have."""
    return {path: {name: (members, *shape) for name, shape in leaves.items()} for path, leaves in shapes.items()}


def is_stacked(params: object, shapes: Shapes) -> bool:
    """Whether a tree looks like a stack: its first leaf has one axis more than a params tree's."""
    first = next(((path, name, shape) for path, leaves in shapes.items() for name, shape in leaves.items()), None)
    if first is None:  # nothing is trained
        return False
    path, name, shape = first
    found = params.get(path) if isinstance(params, Mapping) else None
    leaf = found.get(name) if isinstance(found, Mapping) else None
    return isinstance(leaf, Tensor) and leaf.dim() == len(shape) + 1


def steered(plan: Plan, params: AnyTree, c: float | Tensor, members: int | None) -> Tree:
    """Return params at strength `c`. A stack of `members` takes one strength for all or, where `c` is a vector, one for each."""
    several = {target.path: plan.layer(target, cfg) for target, cfg in plan.entries if target.kind.pairs is not Kind.pairs}
    configs = {cfg.name: cfg for _, cfg in plan.entries} | {target.path: cfg for target, cfg in plan.entries}

    def one(params: AnyTree, c: float | Tensor) -> Tree:
        return {path: _at_strength(configs[path], several.get(path), leaves, c) for path, leaves in params.items()}

    axes = strength_axes(c, members)
    c = c if isinstance(c, Tensor) else float(c)  # a number of numpy's would make an array of a tensor
    return one(params, c) if axes == (None, None) else torch.vmap(one, in_dims=axes)(tree_map(lambda p: p, params), c)


def _at_strength(cfg: AdapterConfig, W: Any, leaves: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Return the params of one place in a tree at strength `c`. `W` is a layer that may hold several maps: each is steered by itself."""
    if W is None:
        return _steered(cfg, leaves, c)
    maps = iter([_steered(cfg, own, c) for _, own in W.pairs(leaves)])
    found: dict[str, Tensor] = W.make(lambda _: next(maps))
    return found


def _steered(cfg: AdapterConfig, leaves: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Run a variant's `steer`.

    Raises:
        TypeError: where it returns anything but tensors of the same names and shapes.
    """
    found: Any = cfg.steer(leaves, c)
    tensors = isinstance(found, Mapping) and all(isinstance(p, Tensor) for p in found.values())
    if not tensors or found.keys() != leaves.keys() or any(found[name].shape != p.shape for name, p in leaves.items()):
        shapes = {name: _shape(p) for name, p in found.items()} if isinstance(found, Mapping) else type(found).__name__
        wanted = {name: _shape(p) for name, p in leaves.items()}
        raise TypeError(f"{type(cfg).__name__}.steer: expected params of shapes {wanted}, found {shapes}. Return all that it is given.")
    return dict(found)


def strength_axes(c: float | Tensor, members: int | None) -> tuple[int | None, int | None]:
    """Return the axes that `steer` maps over, of a params tree and of its strength.

    Raises:
        ValueError: where `c` is neither a scalar nor a strength for each of `members`, or not finite. Values of a tensor are
            read on the CPU alone, and not under a transform or while compiling.
        TypeError: where `c` is neither a real number nor a tensor of real ones.
    """
    if not isinstance(c, Tensor | Real) or isinstance(c, bool):  # of numpy, too
        raise TypeError(f"adapt.steer: expected c as a number or a tensor, found {type(c).__name__}. Wrap a list in torch.tensor(...).")
    if isinstance(c, Tensor) and c.is_meta:
        raise ValueError("adapt.steer: expected c with a value, found it on meta. Pass a number, or a tensor on the params' device.")
    if isinstance(c, Tensor) and (c.is_complex() or c.dtype is torch.bool):
        raise TypeError(f"adapt.steer: expected c as a real number, found {c.dtype}. Use e.g. c.float().")
    if not isinstance(c, Tensor):
        numbers = [c if isinstance(c, int) else float(c)]
    elif c.device.type == "cpu" and not in_transform():  # elsewhere a read would be waited for
        numbers = c.detach().flatten().tolist()
    else:
        numbers = []
    if strange := [number for number in numbers if not abs(number) <= sys.float_info.max]:
        raise ValueError(f"adapt.steer: expected c as a finite number, found {strange[0]}. Use 0 for the base model and 1 for the adapter.")
    shape = tuple(c.shape) if isinstance(c, Tensor) else ()
    if len(shape) > 1 or (members is not None and shape not in ((), (members,))):
        wanted = "a vector," if members is None else f"of shape ({members},), a strength for each member,"
        raise ValueError(
            f"adapt.steer: expected c as a scalar or {wanted} found shape {shape}. For a strength by row, gather the members of the rows "
            "first: ll.tree_map(lambda p: p[index], stacked)."
        )
    return (None if members is None else 0), (0 if shape else None)


def index_of(index: Tensor | Sequence[int] | None, members: int, device: torch.device, caller: str = "mixed") -> Tensor | None:
    """Check an index of adapters, one for each row, and return it as a tensor.

    Raises:
        ValueError: where it names a member that is not there. Values of a tensor are read on the CPU alone, where nothing waits for them,
            and not under a transform or while compiling.
        TypeError: where it holds no integers.
    """
    if index is None:
        return None
    if not isinstance(index, Tensor):
        # An iterator is gone when it has been looked at, and a mapping has keys of its own.
        given = list(index) if isinstance(index, Iterable) and not isinstance(index, Mapping) else None
        wrong = [index] if given is None else [k for k in given if isinstance(k, bool) or not isinstance(k, Integral)]
        if given is None or wrong:
            raise TypeError(
                f"adapt.{caller}: expected index as integers, a row each, found {wrong[0]!r}. Give each row the number of its adapter, in "
                "a list."
            )
        _require_members(given, members, caller)
        return torch.tensor(given, dtype=torch.long, device=device)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        found = f"{index.dtype} of shape {tuple(index.shape)}"
        raise TypeError(f"adapt.{caller}: expected index as a vector of integers, found {found}. Give each row the number of its adapter.")
    require_values([index])
    if index.is_meta and device.type != "meta":
        raise ValueError(
            f"adapt.{caller}: expected index with values, found it on meta. Give each row the number of its adapter, in a list."
        )
    if index.device.type == "cpu" and not in_transform():
        _require_members(index.tolist(), members, caller)
    return index.to(device, torch.long)


def _require_members(index: Sequence[int], members: int, caller: str) -> None:
    outside = [k for k in index if not 0 <= k < members]
    if outside:
        raise ValueError(f"adapt.{caller}: expected index in 0..{members - 1}, found {outside[0]}. The stack has {members} members.")
