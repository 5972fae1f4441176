"""Parameter trees: `{target path: {name: tensor}}`, as they are read, joined and taken apart."""

from collections.abc import Callable, Mapping

from torch import Tensor

Tree = dict[str, dict[str, Tensor]]


def join(path: str, name: str) -> str:
    """Join a module path and a name; the root module has the empty path."""
    return f"{path}.{name}" if path else name


def flatten(tree: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name every leaf `<target path>.<name>`."""
    return {join(path, name): leaf for path, leaves in tree.items() for name, leaf in leaves.items()}


def tree_map(f: Callable[[Tensor], Tensor], tree: Mapping[str, Mapping[str, Tensor]]) -> Tree:
    """Apply `f` to every leaf; the keys stay."""
    return {path: {name: f(leaf) for name, leaf in leaves.items()} for path, leaves in tree.items()}
