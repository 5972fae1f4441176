"""Number the blocks of a model, for the field `layers`: by its list of blocks, wherever that stands in the path of a layer."""

from collections import Counter
from collections.abc import Iterable

from torch import nn

USUAL = frozenset(("layers", "layer", "h", "block", "blocks"))
"""The names that models give to their lists of blocks."""


def block_indices(model: nn.Module, paths: Iterable[str]) -> dict[str, int | None]:
    """Return the number of the block that holds the layer at each path; None for a layer in no list.

    Of several lists around a layer the outermost counts that has one of the usual names and similar blocks, else the outermost of similar
    blocks, else the first. So experts and heads in a block are not taken for blocks, nor the parts of an `nn.Sequential` around a model.
    """
    similar: dict[str, Counter[type]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))

    def classes(parent: str) -> "Counter[type]":
        if parent not in similar:
            similar[parent] = Counter(type(child) for child in modules[parent].children()) if parent in modules else Counter()
        return similar[parent]

    def index(path: str) -> int | None:
        parts = path.split(".")
        spots = [k for k, part in enumerate(parts) if part.isdigit()]
        usual = [k for k in spots if k and parts[k - 1] in USUAL and _repeats(classes(".".join(parts[:k])))]
        alike = [k for k in spots if _alike(modules.get(".".join(parts[: k + 1])), classes(".".join(parts[:k])))]
        best = next(iter((*usual, *alike, *spots)), None)
        return None if best is None else int(parts[best])

    return {path: index(path) for path in paths}


def _repeats(classes: "Counter[type]") -> bool:
    return len(classes) == 1 or max(classes.values(), default=0) > 1


def _alike(block: nn.Module | None, classes: "Counter[type]") -> bool:
    return block is not None and classes[type(block)] > 1
