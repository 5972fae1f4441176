"""Mixed batches: each row of a batch through its own adapter, the frozen model run once.

Only the variant's pure function is vmapped, at each target, over the adapters; everything else sees one ordinary batch. So it works
wherever the model does, with padding masks and fused attention that a whole-model `vmap` cannot run.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.clone.bind import Adapted, Shapes, apply_part, apply_variant
from lora_lite.core.config import AdapterConfig
from lora_lite.core.frozen import Frozen
from lora_lite.core.tree import AnyTree, Tree, tree_map
from lora_lite.prepare.targets import Target
from lora_lite.transforms.gradients import in_transform

INDEX = "mixed_index"


class _Mixed(Adapted):
    """A target whose params have a leading adapter axis; its index says which adapter each row takes."""

    def _run(self, W: Frozen, x: Tensor) -> Tensor:
        cfg, _, _, path = self._lora_lite
        params = self._params_in_place(W)
        index = getattr(self, INDEX)
        if not W.has_input:
            raise ValueError(
                f'adapt.mixed: expected targets that are called with rows of the batch, found "{path}", whose weight is read by the module '
                "around it: all rows see the same one. Leave it out, or run the members one by one."
            )
        if W.stacked:
            experts: Any = W
            return experts.over_members(functools.partial(apply_part, cfg), params, x, None if index.device.type == "meta" else index)
        if index.device.type == "meta":  # not given: equal contiguous groups
            rows = next(iter(params.values())).shape[0]
        else:
            rows = index.shape[0]
            params = {name: p.index_select(0, index) for name, p in params.items()}
        if x.shape[0] % rows if rows else x.shape[0]:
            raise ValueError(
                f'adapt.mixed: expected the input of "{path}" to have a multiple of {rows} rows, found shape {tuple(x.shape)}. The model '
                "regroups rows before this layer (routed experts do), so they cannot be followed; leave the layer out."
            )
        if not getattr(W, "alone", True):
            raise ValueError(
                f'adapt.mixed: expected "{path}" to be called with one tensor, found several, whose rows cannot be told from '
                "what rows share. Train a part of it that takes one."
            )
        if not rows:  # vmap takes no empty axis
            params, rows = {name: p.new_zeros(1, *p.shape[1:]) for name, p in params.items()}, 1
        y = torch.vmap(lambda p, rows: apply_variant(cfg, p, W, rows), randomness="different")(params, x.unflatten(0, (rows, -1)))
        return y.flatten(0, 1)


@functools.cache
def _mixed_class(cls: Any) -> Any:
    """Make the class of a mixed target from that of a target; the same one for the same class."""
    return type(cls.__name__, (_Mixed, *(b for b in cls.__bases__ if b is not Adapted)), {"__module__": cls.__module__})


def make_mixed(clone: nn.Module) -> nn.Module:
    """Turn the targets of a bound clone into mixed ones."""
    for layer in clone.modules():
        if isinstance(layer, Adapted):
            layer.__class__ = _mixed_class(type(layer))  # type: ignore[arg-type]
            layer.register_buffer(INDEX, torch.empty((), device="meta"), persistent=False)
    return clone


def stack(trees: Iterable[AnyTree]) -> Tree:
    """Stack params trees along a leading adapter axis.

    Args:
        trees: at least one; all with the same keys and shapes.

    Returns:
        A tree whose leaves are `(K, ...)`; `unstack` undoes it.

    Raises:
        ValueError: where there is none, or they differ.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> ll.stack([adapt.init(seed=0), adapt.init(seed=1)])["0"]["A"].shape
        torch.Size([2, 2, 8])
    """
    if isinstance(trees, Mapping) or not (trees := list(trees)):
        found = "one tree" if isinstance(trees, Mapping) else "none"
        raise ValueError(f"stack: expected at least one params tree, in a list, found {found}. Pass a list of trees.")
    layouts = [{path: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for path, leaves in tree.items()} for tree in trees]
    for k, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise ValueError(f"stack: expected trees with the same keys and shapes, found tree {k} to differ from tree 0. Use one adapt's.")
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def unstack(stacked: AnyTree) -> list[Tree]:
    """Split a stacked tree into its members."""
    members = stacked_size(stacked)
    return [tree_map(lambda leaf, k=k: leaf[k], stacked) for k in range(members)]


def stacked_size(stacked: AnyTree) -> int:
    """Give the length of the adapter axis.

    Raises:
        ValueError: where the leaves have none in common.
    """
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaves in stacked.values() for leaf in leaves.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"stack: expected leaves with one leading adapter axis, found lengths {sorted(sizes)}. Make them with ll.stack.")
    return sizes.pop()


def member_shapes(shapes: Shapes, members: int) -> Shapes:
    """Give the shapes that the leaves of a stacked tree must have."""
    return {path: {name: (members, *shape) for name, shape in leaves.items()} for path, leaves in shapes.items()}


def is_stacked(params: object, shapes: Shapes) -> bool:
    """Tell whether a tree looks like a stack: its first leaf has one axis more than a params tree's."""
    path, leaves = next(iter(shapes.items()))
    name, shape = next(iter(leaves.items()))
    found = params.get(path) if isinstance(params, Mapping) else None
    leaf = found.get(name) if isinstance(found, Mapping) else None
    return isinstance(leaf, Tensor) and leaf.dim() == len(shape) + 1


def steered(entries: Iterable[tuple[Target, AdapterConfig]], params: AnyTree, c: float | Tensor, members: int | None) -> Tree:
    """Give params at strength `c`, those of a stack of `members` where there is one; each member at its own where `c` has several."""

    def one(params: AnyTree, c: float | Tensor) -> Tree:
        return {target.path: dict(cfg.steer(params[target.path], c)) for target, cfg in entries}

    axes = strength_axes(c, members)
    return one(params, c) if axes == (None, None) else torch.vmap(one, in_dims=axes)(tree_map(lambda p: p, params), c)


def strength_axes(c: float | Tensor, members: int | None) -> tuple[int | None, int | None]:
    """Give the axes that `steer` maps over, of a params tree and of its strength.

    Raises:
        ValueError: where `c` is neither a scalar nor a strength for each of `members`.
        TypeError: where `c` is neither a number nor a tensor.
    """
    if not isinstance(c, Tensor | int | float):
        raise TypeError(f"adapt.steer: expected c as a number or a tensor, found {type(c).__name__}. Wrap a list in torch.tensor(...).")
    shape = tuple(c.shape) if isinstance(c, Tensor) else ()
    if len(shape) > 1 or (members is not None and shape not in ((), (members,))):
        wanted = "a vector," if members is None else f"of shape ({members},), a strength for each member,"
        raise ValueError(
            f"adapt.steer: expected c as a scalar or {wanted} found shape {shape}. For a strength by row, gather the members of the rows "
            "first: ll.tree_map(lambda p: p[index], stacked)."
        )
    return (None if members is None else 0), (0 if shape else None)


def index_of(index: Tensor | Sequence[int] | None, members: int, device: torch.device) -> Tensor | None:
    """Check an index of adapters, a row each, and give it as a tensor.

    Raises:
        ValueError: where it names a member that is not there. Values of a tensor are read on the CPU alone, where nothing waits for them,
            and not under a transform or while compiling.
        TypeError: where it holds no integers.
    """
    if index is None:
        return None
    if not isinstance(index, Tensor):
        wrong = [k for k in index if isinstance(k, bool) or not isinstance(k, Integral)]
        if wrong:
            raise TypeError(
                f"adapt.mixed: expected index as integers, a row each, found {wrong[0]!r}. Give each row the number of its adapter."
            )
        _require_members(index, members)
        return torch.tensor(list(index), dtype=torch.long, device=device)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        found = f"{index.dtype} of shape {tuple(index.shape)}"
        raise TypeError(f"adapt.mixed: expected index as a vector of integers, found {found}. Give each row the number of its adapter.")
    if index.device.type == "cpu" and not in_transform():
        _require_members(index.tolist(), members)
    return index.to(device, torch.long)


def _require_members(index: Sequence[int], members: int) -> None:
    outside = [k for k in index if not 0 <= k < members]
    if outside:
        raise ValueError(f"adapt.mixed: expected index in 0..{members - 1}, found {outside[0]}. The stack has {members} members.")
