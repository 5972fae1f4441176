"""Several linear maps kept side by side in one weight, such as a fused q-k-v projection, each adapted by itself.

Params and constants of a map stand under its name: `q.A`, `q.B`, `k.A`, ... The maps may be of unequal widths.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.frozen import Frozen
from lora_lite.layers.identity import at_identity, on_meta
from lora_lite.layers.kind import Kind, Params, Variant


class FusedKind(Kind):
    """A linear layer whose outputs are those of several maps. A subclass lists them in `widths`.

    Subclass it beside the kind of the layer: `class FusedQKV(ll.FusedKind, LinearKind)`, or give `weight` and `bias` yourself.
    """

    def widths(self) -> Mapping[str, int]:
        """Return the width of each map's output by the map's name, in the order in which the weight has them."""
        raise NotImplementedError(f"{type(self).__name__}.widths() -> names and widths is not defined")

    @property
    def maps(self) -> dict[str, Frozen]:
        """The maps by name, each with its constants."""
        widths = self.widths()
        total, o = sum(widths.values()), self.out_features
        if total != o:
            raise ValueError(f"{type(self).__name__}.widths: expected widths that add up to {o}, found {dict(widths)}. Correct them.")
        sizes = list(widths.values())
        weights = self.weight.split(sizes)
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        maps = {n: Frozen(w, b, _under(self.constants, n), self.training) for n, w, b in zip(widths, weights, biases)}
        for W in maps.values():
            W.active = self.active
        return maps

    def make(self, tree: Callable[[Frozen], Params]) -> dict[str, Tensor]:
        self._require_widths()
        return {f"{n}.{leaf}": t for n, W in self.maps.items() for leaf, t in tree(W).items()}

    def _require_widths(self) -> None:
        """Raise unless `widths` returns names that files can tell apart, each with a width."""
        found: Any = self.widths()
        fits = isinstance(found, Mapping) and all(isinstance(n, str) and n and "." not in n for n in found)
        if not fits or not all(isinstance(w, int) and w > 0 for w in found.values()):
            raise ValueError(
                f"{type(self).__name__}.widths: expected names without dots and widths of at least 1, found {found!r}. "
                'Return e.g. {"q": 8, "k": 2, "v": 2}.'
            )

    def pairs(self, params: Params) -> Sequence[tuple[Frozen, Params]]:
        return [(W, _under(params, n)) for n, W in self.maps.items()]

    def apply(self, f: Variant, params: Params, x: Any) -> Any:
        return torch.cat([f(p, W, x) for W, p in self.pairs(params)], dim=-1)

    def adapted(self, f: Variant, params: Params, role: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([at_identity(f, p, W, role, dtype) for W, p in self.pairs(params)])

    def probe(self, tokens: int) -> list[tuple[str, Frozen, Tensor, int]]:
        return [(n, *on_meta(W, tokens)) for n, W in self.maps.items()]

    def part(self, tree: Params, name: str) -> Params:
        return _under(tree, name)


def _under(tree: Params, name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {leaf.removeprefix(prefix): t for leaf, t in tree.items() if leaf.startswith(prefix)}
