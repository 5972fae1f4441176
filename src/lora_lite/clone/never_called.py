"""Notice a target that the model never calls: one whose weight is read directly, or that its parent leaves out.

Such a target would be adapted in name only. Each clone is watched until every target has been called once; from then on
nothing is left of the watch. A target counts as missed if the module around it ran and it did not. Routed experts and dropped layers
are not missed: there the module around the target did not run, or a sibling with another index did.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_lite.core.errors import listed

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Audit:
    """The watch over one clone's targets."""

    def __init__(self, clone: nn.Module, paths: list[str]) -> None:
        self._clone = clone
        self.unseen = set(paths)
        self._seen_families: set[str] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record which modules run; raise at the end for targets that were passed over.

        Raises:
            ValueError: it names the targets.
        """
        ran: set[str] = set()
        parents = {path: self._caller(path) for path in self.unseen}
        handles = []
        try:
            for path in {*self.unseen, *parents.values()}:
                module = self._clone.get_submodule(path)
                handles.append(module.register_forward_pre_hook(lambda *_, path=path: ran.add(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._seen_families |= {self._family(path) for path in self.unseen & ran}
        self.unseen -= ran
        missed = [p for p in sorted(self.unseen) if parents[p] in ran and self._family(p) not in self._seen_families]
        if missed:
            raise ValueError(
                f"adapt: expected the model to call each target, found that it ran the modules around {listed(missed)} but never "
                "these layers themselves: it reads their weights directly or does not use them, so an adapter there has no effect. "
                f'Leave them out with exclude_names, e.g. "{re.escape(missed[0])}$".'
            )

    def _caller(self, path: str) -> str:
        """Give the nearest module around a target that is called, not only indexed."""
        parent = path.rpartition(".")[0]
        while parent and isinstance(self._clone.get_submodule(parent), _CONTAINERS):
            parent = parent.rpartition(".")[0]
        return parent

    def _family(self, path: str) -> str:
        """Name a target by its path with the keys of lists and dicts of modules left open."""
        parts = path.split(".") if path else []
        around = [self._clone.get_submodule(".".join(parts[:k])) for k in range(len(parts))]
        return ".".join("*" if isinstance(m, _CONTAINERS) or part.isdigit() else part for m, part in zip(around, parts))
