"""Modules that are trained as a whole, and what lies inside them."""

from collections.abc import Mapping, Sequence

from lora_lite.core.errors import listed
from lora_lite.layers.kind import Kind


def outermost(paths: Sequence[str]) -> list[str]:
    """Leave out the paths of modules inside others of the list."""
    known = set(paths)
    return [path for path in paths if not any(path[:k] in known for k, letter in enumerate(path) if letter == ".")]


def refuse_nested(paths: Mapping[str, type[Kind]]) -> None:
    """Refuse targets inside a module that is trained as a whole.

    Raises:
        ValueError: it names them.
    """
    whole = [path for path, kind in paths.items() if "moved" in kind.gives]
    nested = [path for path in paths for other in whole if path.startswith(f"{other}.")]
    if nested:
        raise ValueError(
            f"build: expected no target inside a module that is trained as a whole, found {listed(nested)}. Leave them out with "
            "exclude_names, or train less than the whole module."
        )
