"""Stacks of params trees for mixed batches: trees of one adapt, or of several, whose ranks may differ."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.core.errors import listed, require_tree, require_type, trainable
from lora_lite.core.tracing import in_transform
from lora_lite.core.tree import AnyTree, Tree
from lora_lite.derived.mixed import place_of_leaf, stack_trees, unstack_tree
from lora_lite.transforms.hosting import Pair, factors_in, host_of, tree_in
from lora_lite.transforms.padding import LeafShapes, alike, grown, holds, known_neutral, padded_to
from lora_lite.transforms.places import require_same_weights

Pad = bool | Literal["frozen"]


@overload
def stack(trees: Iterable[AnyTree], pad: Pad = False) -> Tree:
    """Stack trees of one adapt."""


@overload
def stack(trees: Iterable[Pair], pad: Pad = False, adapt: Adapt | None = None) -> tuple[Adapt, Tree]:
    """Stack trees of several adapts, each beside its own."""


def stack(trees: Iterable[Any], pad: Pad = False, adapt: Adapt | None = None) -> Any:
    """Stack params trees along a leading adapter axis.

    With `pad`, trees of smaller ranks get zeros at the end of their axes, where that is neutral: the update is the same, and so are the
    gradients of the entries that were there. A tree does not say its scale. Bare trees of several ranks are taken to be of one scale, as
    LoRA's with one `alpha / r`. Pairs `(adapt, params)`, as `load` and `from_peft` return them, may be of several: a factor of one leaf,
    LoRA's `B`, makes up for the difference, so that each member computes what it did. Targets that a pair lacks stay at the base model.
    Dropout is that of the adapt which runs the stack.

    Args:
        trees: at least one; all with the same keys and, unless padded, shapes. Or pairs of adapts of one model, each with its params.
        pad: True to pad smaller ranks, for a stack that is used or trained: no gradient reaches the padding. `"frozen"` for a stack that
            is used alone: more variants, such as PiSSA, are padded so, but their padding would be trained too. So would gates, norms,
            tokens and whole modules that a pair lacks.
        adapt: for pairs, the adapt that is to run the stack; None for the first pair's that has room for all.

    Returns:
        A tree whose leaves are `(K, ...)`; `unstack` undoes it. For pairs, the adapt that runs it, and the tree.

    Raises:
        ValueError: where there is none, they differ, padding would not be neutral, or no adapt has room for all. It names the first leaf.
            Where pairs stand on other weights than the first; it names the targets.
            Also where a pair's config means another thing by the same leaves, such as another invocation.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapt = ll.build(model, ll.LoRAConfig(r=2))
        >>> ll.stack([adapt.init(seed=0), adapt.init(seed=1)])["0"]["A"].shape
        torch.Size([2, 2, 8])
        >>> small = ll.build(model, ll.LoRAConfig(r=1))
        >>> host, stacked = ll.stack([(small, small.init()), (adapt, adapt.init())], pad=True)
        >>> host is adapt, stacked["0"]["A"].shape
        (True, torch.Size([2, 2, 8]))
    """
    several = isinstance(trees, Iterable) and not isinstance(trees, Tensor | nn.Module | str)
    require_type(several, "stack([params, params, ...])", "trees", "a list of params trees", trees)
    require_type(not isinstance(pad, Mapping), "stack([params, params, ...])", "pad", 'True, False or "frozen"', pad)
    if not (isinstance(pad, bool) or pad == "frozen"):
        raise ValueError(f'stack: expected pad as True, False or "frozen", found {pad!r}. Use True for a stack that is trained.')
    _require_host("stack([(adapt, params), ...], adapt=host)", adapt)
    if isinstance(trees, Mapping) or not (trees := list(trees)):
        found = "one tree" if isinstance(trees, Mapping) else "none"
        raise ValueError(f"stack: expected at least one params tree, in a list, found {found}. Pass a list of trees.")
    if all(_is_pair(tree) for tree in trees):
        host = host_of(trees, adapt)
        members = [tree_in(host, own, tree, k, pad) for k, (own, tree) in enumerate(trees)]
        require_same_weights("stack", [*(own for own, _ in trees), host])
        return host, stack_trees(members)
    for k, tree in enumerate(trees):
        require_tree("stack([params, params, ...])", f"tree {k}", tree, "a params tree")
        _require_dense(tree, k)
    if adapt is not None:
        raise ValueError("stack: expected pairs (adapt, params) beside an adapt, found trees, which do not say their own. Pass pairs.")
    return stack_trees(_padded(trees, pad is True) if pad else trees)


def _require_dense(tree: AnyTree, k: int) -> None:
    """Refuse leaves that no adapt takes, which stacking would convert beside others without a word."""
    for path, leaves in tree.items():
        for name, leaf in leaves.items():
            if leaf.layout is not torch.strided or not trainable(leaf.dtype):
                found = leaf.dtype if leaf.layout is torch.strided else leaf.layout
                raise ValueError(
                    f"stack: expected dense leaves of a floating dtype of 16 bits or more, found {found} at {place_of_leaf(path, name)} in "
                    f"tree {k}. Convert it first, e.g. leaf.float() or leaf.to_dense()."
                )


@overload
def unstack(stacked: AnyTree, like: Sequence[AnyTree] | None = None) -> list[Tree]:
    """Split a stack of trees of one adapt."""


@overload
def unstack(stacked: AnyTree, like: Sequence[Pair], adapt: Adapt | None = None) -> list[Tree]:
    """Split a stack of trees of several adapts."""


def unstack(stacked: AnyTree, like: Sequence[Any] | None = None, adapt: Adapt | None = None) -> list[Tree]:
    """Split a stacked tree into its members.

    Args:
        stacked: a params tree with a leading adapter axis.
        like: the trees or pairs that were stacked, to take off padding and factors; None to leave the members as the stack has them, as
            views of it.
        adapt: for pairs, the adapt that `stack` returned; None for the one that it would.

    Raises:
        ValueError: where there is no common adapter axis, `like` is of another number or of other leaves, or padding is no longer zero, so
            that taking it off would lose something.

    Example:
        >>> import torch, lora_lite as ll
        >>> trees = [{"0": {"A": torch.ones(r, 3), "B": torch.ones(2, r)}} for r in (1, 4)]
        >>> ll.unstack(ll.stack(trees, pad=True), like=trees)[0]["0"]["A"].shape
        torch.Size([1, 3])
    """
    members = unstack_tree(stacked)
    if like is None:
        return members
    call = "unstack(stacked, like=trees)"
    in_list = isinstance(like, Sequence) and not isinstance(like, str)
    require_type(in_list, call, "like", "a list of the trees or pairs that were stacked", like)
    _require_host(call, adapt)
    if len(like) != len(members):
        raise ValueError(f"unstack: expected {len(members)} trees in like, one for each member, found {len(like)}.")
    if not all(_is_pair(tree) for tree in like):
        for k, tree in enumerate(like):
            require_tree(call, f"tree {k} of like", tree, "a params tree")
        return [_cut(member, tree, {}, k) for k, (member, tree) in enumerate(zip(members, like))]
    host = host_of(like, adapt)
    scales = [{} if own is host else factors_in(host, own, k, "frozen") for k, (own, _) in enumerate(like)]
    return [_cut(member, tree, scale, k) for k, (member, (_, tree), scale) in enumerate(zip(members, like, scales))]


def _require_host(call: str, adapt: object) -> None:
    require_type(adapt is None or isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)


def _is_pair(tree: Any) -> bool:
    return isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[0], Adapt)


def _padded(trees: Sequence[AnyTree], trained: bool) -> list[Tree]:
    """Pad trees to the largest of each leaf, where that is known to be neutral. Other differences are left for `stack_trees` to name."""
    shapes = [{path: {name: tuple(leaf.shape) for name, leaf in leaves.items()} for path, leaves in tree.items()} for tree in trees]
    found: list[Tree] = [{} for _ in trees]
    for path in trees[0]:
        each = [tree[path] for tree in shapes if path in tree]
        if len(each) < len(trees) or not alike(each):
            return [dict(tree) for tree in trees]  # type: ignore[arg-type]
        _require_neutral(path, each, trained)
        room = {name: tuple(max(sizes) for sizes in zip(*(s[name] for s in each))) for name in each[0]}
        for own, tree in zip(found, trees):
            own[path] = {name: padded_to(leaf, room[name]) for name, leaf in tree[path].items()}
    return [{path: own.get(path, dict(leaves)) for path, leaves in tree.items()} for own, tree in zip(found, trees)]


def _require_neutral(path: str, shapes: Sequence[LeafShapes], trained: bool) -> None:
    """Refuse leaves of several shapes unless every variant that has such leaves lets them be padded."""
    odd = next(((name, k) for k, own in enumerate(shapes) for name in own if own[name] != shapes[0][name]), None)
    if odd is None:
        return
    name, k = odd
    leaves = grown([{n.rpartition(".")[2]: shape for n, shape in own.items()} for own in shapes])
    neutral, others = known_neutral(leaves, trained)
    if not neutral or others:
        of = f"they may be those of {listed(others)}, for which it does" if others else "no variant with such leaves is known"
        sizes = f"{shapes[k][name]} in tree {k} beside {shapes[0][name]} in tree 0"
        raise ValueError(
            f'stack: at "{path}" "{name}" expected a leaf whose padding by zeros changes nothing, found {sizes}: {of}. Pass pairs '
            "(adapt, params), whose configs say what they compute, or run the trees one by one."
        )


def _cut(member: Tree, like: AnyTree, scale: Mapping[str, Mapping[str, float]], k: int) -> Tree:
    """Return the part of a member that a tree had before it was padded, without its factors."""
    lost = next(((path, name) for path, leaves in like.items() for name in leaves if name not in member.get(path, {})), None)
    if lost is not None:
        raise ValueError(
            f"unstack: expected the leaves of tree {k} of like to be in the stack, found none for {place_of_leaf(*lost)}. Pass the trees "
            "that were stacked."
        )
    found: Tree = {path: {} for path in like}
    for path, leaves in member.items():
        kept = like.get(path, {})
        for name, leaf in leaves.items():
            shape = tuple(kept[name].shape) if name in kept else (0,) * leaf.dim()
            at = f"unstack: at {place_of_leaf(path, name)} expected"
            if not holds({name: tuple(leaf.shape)}, {name: shape}):
                raise ValueError(
                    f"{at} tree {k} of like to lie within {tuple(leaf.shape)}, found {shape}. Pass the trees that were stacked."
                )
            own = leaf[tuple(slice(n) for n in shape)]
            if not in_transform() and leaf.count_nonzero() != own.count_nonzero():
                raise ValueError(
                    f"{at} zeros beyond {shape} in member {k}, found others: they were trained, and would be lost. Leave out like."
                )
            if name in kept:
                found[path][name] = own / scale[path][name] if name in scale.get(path, {}) else own
    return found
