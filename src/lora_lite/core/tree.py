"""Parameter trees, `{target path: {name: tensor}}`: named, flattened and mapped."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.errors import is_mapping, require_type

Tree = dict[str, dict[str, Tensor]]
AnyTree = Mapping[str, Mapping[str, Any]]


def join(path: str, name: str) -> str:
    """Join a module path and a name. The root module has the empty path."""
    return f"{path}.{name}" if path else name


_still: ContextVar[tuple[nn.Module, Mapping[str, nn.Module]] | None] = ContextVar("_still", default=None)


@contextmanager
def still(root: nn.Module) -> Iterator[None]:
    """Walk a model once for all who ask meanwhile, where it keeps its modules. A build asks a dozen times."""
    token = _still.set((root, modules_by_path(root)))
    try:
        yield
    finally:
        _still.reset(token)


def modules_by_path(root: nn.Module, prefix: str = "") -> Mapping[str, nn.Module]:
    """Return the modules that `named_modules` yields, in its order, without its price: generators in generators."""
    if not torch.compiler.is_compiling():  # which cannot trace a context's variable
        known = _still.get()
        if known is not None and known[0] is root and not prefix:
            return known[1]
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo = [(prefix, root)]
    while todo:
        path, module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[path] = module
            if children := module._modules:
                above = f"{path}." if path else ""
                todo += [(above + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


Apart = dict[tuple[str, str], dict[str, Any]]
"""A tree of linear maps: the leaves of each by the target's path and the map's name in it, empty where the target is one map."""


def apart(tree: AnyTree) -> Apart:
    """Take a tree apart by linear maps. A fused layer has several, with their names before those of their leaves, such as `q.B`."""
    found: Apart = {(path, ""): {} for path, leaves in tree.items() if not leaves}
    for path, leaves in tree.items():
        for name, leaf in leaves.items():
            of, _, own = name.rpartition(".")
            found.setdefault((path, of), {})[own] = leaf
    return found


def together(maps: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put the linear maps of a tree together again."""
    found: dict[str, dict[str, Any]] = {}
    for (path, of), leaves in maps.items():
        found.setdefault(path, {}).update({join(of, name): leaf for name, leaf in leaves.items()})
    return found


def named(place: tuple[str, str]) -> str:
    """Name a linear map: by its target's path, in a fused layer by the map's name too."""
    path, of = place
    return join(path, of) if of else path


def flatten(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Name every leaf `<target path>.<name>`.

    Raises:
        ValueError: where two leaves have one name, of which a file would hold one.
    """
    found: dict[str, Any] = {}
    for path, leaves in tree.items():
        for name, leaf in leaves.items():
            if (where := join(path, name)) in found:
                raise ValueError(
                    f'expected a name of its own for each tensor, found two "{where}". Give the variant\'s tensors names without dots.'
                )
            found[where] = leaf
    return found


def tree_leaves(tree: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """List the leaves of a params tree, always in the same order.

    Raises:
        TypeError: where `tree` is no tree, or one of trees, as of an adapter beside a head: each has leaves of its own.

    Example:
        >>> import torch, lora_lite as ll
        >>> adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(8, 4)), ll.LoRAConfig(r=2))
        >>> [tuple(leaf.shape) for leaf in ll.tree_leaves(adapt.init(seed=0))]
        [(2, 8), (4, 2)]
    """
    try:
        found = [leaf for leaves in tree.values() for leaf in leaves.values()]
    except (AttributeError, RuntimeError):
        _require_trees("tree_leaves", tree)
        raise
    if any(isinstance(leaf, Mapping) for leaf in found):
        _require_trees("tree_leaves", tree)
    return found


def tree_map(
    f: Callable[..., Any], tree: Mapping[str, Mapping[str, Any]], *others: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Apply `f` to the corresponding leaves of one or several params trees. The keys are those of the first.

    Gradients and the steps of an optimiser are mapped so. An adapter's strength is not: most leaves are factors of the update. Minus a LoRA
    tree is the same update, half of it is a quarter, and the mean of two is not the mean of their updates. `adapt.steer` scales an update,
    and `combine` sums several.

    Raises:
        TypeError: where an argument is no tree, or `f` no function.
        ValueError: where one of the others lacks a leaf of the first.

    Example:
        >>> import torch, lora_lite as ll
        >>> params = {"0": {"g": torch.ones(2)}}
        >>> grads = {"0": {"g": torch.full((2,), 2.0)}}
        >>> ll.tree_map(lambda p, g: p - 0.5 * g, params, grads)
        {'0': {'g': tensor([0., 0.])}}
        >>> A, B = torch.ones(1, 2), torch.full((2, 1), 8.0)
        >>> half = ll.tree_map(lambda p: 0.5 * p, {"0": {"A": A, "B": B}})["0"]
        >>> (half["B"] @ half["A"] / (B @ A)).unique()
        tensor([0.2500])
    """
    try:
        return {
            path: {name: f(leaf, *(other[path][name] for other in others)) for name, leaf in leaves.items()}
            for path, leaves in tree.items()
        }
    except (AttributeError, KeyError, TypeError, IndexError):
        require_type(callable(f), "tree_map(f, tree)", "f", "a function of leaves", f)
        _require_trees("tree_map", tree, *others)  # else it is an error of `f`
        raise


def _require_trees(call: str, first: Any, *others: Any) -> None:
    """Raise where an argument is no tree, or lacks a leaf of the first. Asked only after a failure: it costs a good call nothing."""
    for tree in (first, *others):
        odd = next((leaves for leaves in tree.values() if not is_mapping(leaves)), None) if is_mapping(tree) else tree
        if odd is not None or tree is None:
            what = type(tree).__name__ if odd is tree else f"a {type(tree).__name__} of {type(odd).__name__}"
            raise TypeError(
                f"{call}: expected a tree {{target path: {{name: tensor}}}}, found {what}. Pass params as adapt.init returns them, or "
                "adapt.params(module)."
            )
        nested = next((path for path, leaves in tree.items() for leaf in leaves.values() if isinstance(leaf, Mapping)), None)
        if nested is not None:
            raise TypeError(
                f'{call}: expected a tree {{target path: {{name: tensor}}}}, found one of trees, with another at "{nested}". Pass each by '
                "itself, and put what comes of them together."
            )
    for other in others:
        for path, leaves in first.items():
            missing = next((name for name in leaves if path not in other or name not in other[path]), None)
            if missing is not None:
                where = join(path, missing)
                raise ValueError(
                    f'{call}: expected trees with the leaves of the first, found one without "{where}". Map trees of one adapt.'
                )
