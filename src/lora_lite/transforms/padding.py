"""Whether a tree of a smaller rank, padded by zeros, computes the same under a config of a larger one.

It is shown and not declared: both variants run in float64 on one layer, at random params. The padded tree must give the same update. For
training, the update must not move at first order where the padding does: then no gradient reaches the padding, and a member trains as it
would by itself. Else it must be continuous there, which a reflection along a zero vector is not. A scale that depends on the rank
(`alpha / r`) is made up for by a factor of some leaves, which is found in the same way.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.core.frozen import Frozen, Params
from lora_lite.layers.kind import Variant
from lora_lite.variants import VARIANTS

LeafShapes = Mapping[str, tuple[int, ...]]
Factors = dict[str, float]
Grown = tuple[tuple[str, int, tuple[int, ...]], ...]
"""For each leaf its name, its number of axes, and those along which trees differ."""

_STEP, _SAME = 1e-6, 1e-9
_STILL = {True: 1e-8, False: 1e-3}
"""The step of the padding; the largest relative differences of updates that are the same, and that the step may make, trained or not."""


@dataclass(frozen=True)
class Side:
    """A variant on a linear map, with the shapes of its params."""

    cfg: Any
    W: Frozen
    shapes: LeafShapes

    def update(self, params: Params, x: Tensor) -> Tensor:
        """Return the adapter's part of the layer's output, `(*b, o)`."""
        y: Tensor = Variant(self.cfg)(params, self.W, x)
        return y - self.W(x)


def padded_to(leaf: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad a leaf by zeros at the end of its axes. Differentiable, and the leaf itself where it has that shape."""
    if tuple(leaf.shape) == tuple(shape):
        return leaf
    more = [n for size, want in zip(reversed(leaf.shape), reversed(shape)) for n in (0, want - size)]
    return F.pad(leaf, more)


def holds(shapes: LeafShapes, smaller: LeafShapes) -> bool:
    """Whether leaves of the one shapes have room for those of the other."""
    same = shapes.keys() == smaller.keys() and all(len(shapes[name]) == len(shape) for name, shape in smaller.items())
    return same and all(n <= room for name, shape in smaller.items() for n, room in zip(shape, shapes[name]))


def factors(own: Side, host: Side, trained: bool = True) -> Factors | None:
    """Return the factors of the leaves, 1.0 left out, by which a tree padded by zeros computes under `host` what it did; None for none."""
    if not holds(host.shapes, own.shapes):
        return None
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(host.W.device)

    x = draw(4, host.W.in_features)
    params = {name: draw(*shape) for name, shape in own.shapes.items()}
    padded = {name: padded_to(p, host.shapes[name]) for name, p in params.items()}
    step = {name: _STEP * draw(*shape) * padded_to(torch.ones_like(params[name]), shape).eq(0) for name, shape in host.shapes.items()}
    with torch.no_grad():
        want = own.update(params, x)
        for found in _candidates(own.cfg, host.cfg, list(params)):
            scaled = {name: found.get(name, 1.0) * p for name, p in padded.items()}
            got = host.update(scaled, x)
            if _near(got, want, _SAME):
                moved = host.update({name: p + step[name] for name, p in scaled.items()}, x)
                return found if _near(moved, got, _STILL[trained]) else None
    return None


@torch.no_grad()
def idle(host: Side, trained: bool = True) -> bool:
    """Whether a tree of zeros leaves the layer as it is and, where it is trained, as it stays."""
    g = torch.Generator().manual_seed(0)
    x, *drawn = [
        torch.randn(shape, generator=g, dtype=torch.float64).to(host.W.device) for shape in ((4, host.W.in_features), *host.shapes.values())
    ]
    params = dict(zip(host.shapes, drawn))
    some, none, little = (host.update({name: c * p for name, p in params.items()}, x) for c in (1.0, 0.0, _STEP))
    size = torch.linalg.vector_norm(some)
    return bool(torch.linalg.vector_norm(none) <= _SAME * size and torch.linalg.vector_norm(little) <= _STILL[trained] * size)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b))


def _candidates(own: Any, host: Any, names: Sequence[str]) -> Iterator[Factors]:
    """Yield factors that may make up for another scale: none, then of one leaf, of two ... Leaves that a strength scales come first."""
    yield {}
    steered = [name for name in names if name in (host.steered or ())]
    order = [*steered, *(name for name in names if name not in steered)]
    scales = _scales(own, host)
    for count in range(1, min(len(order), 4) + 1):
        for chosen in itertools.combinations(order, count):
            yield from (dict.fromkeys(chosen, c ** (1 / root)) for c in scales for root in range(1, count + 1))


def _scales(own: Any, host: Any) -> list[float]:
    """List the ratios that two configs' scales may have, by their fields `scale`, `alpha` and `r`."""
    ratio = {name: getattr(own, name, 1) / (getattr(host, name, 1) or 1) for name in ("scale", "alpha", "r") if _number(own, host, name)}
    alpha, r = ratio.get("alpha", 1.0), ratio.get("r", 1.0)
    found = [ratio.get("scale", 1.0), alpha / r, alpha / math.sqrt(r), alpha, 1 / r]
    return [c for c in dict.fromkeys(found) if c > 0 and c != 1.0]


def _number(own: Any, host: Any, name: str) -> bool:
    return all(isinstance(getattr(cfg, name, None), int | float) and getattr(cfg, name) for cfg in (own, host))


def alike(shapes: Sequence[LeafShapes]) -> bool:
    """Whether the leaves of one target have the same names and numbers of axes in all trees."""
    return len({tuple(sorted((name, len(shape)) for name, shape in each.items())) for each in shapes}) == 1


def grown(shapes: Sequence[LeafShapes]) -> Grown:
    """Return the axes along which the leaves of one target differ between trees."""
    first = shapes[0]
    axes = {name: [k for k in range(len(shape)) if len({s[name][k] for s in shapes}) > 1] for name, shape in first.items()}
    return tuple(sorted((name, len(shape), tuple(axes[name])) for name, shape in first.items()))


@functools.cache
def known_neutral(leaves: Grown, trained: bool) -> tuple[list[str], list[str]]:
    """Name the variants that have such leaves and grow so with the rank: those for which padding is neutral, and the others."""
    neutral: list[str] = []
    others: list[str] = []
    for name, cls in VARIANTS.items():
        sides = next((sides for sides in _versions(cls, {leaf for leaf, *_ in leaves}) if grown([s.shapes for s in sides]) == leaves), None)
        if sides is not None:
            (neutral if factors(*sides, trained) is not None else others).append(name)
    return neutral, others


def _versions(cls: Any, names: set[str]) -> Iterator[tuple[Side, Side]]:
    """Yield a variant at two ranks, with the options off that add leaves and, where it has fewer than these, on."""
    sides = _sides(cls, ())
    if sides is None or not names >= sides[0].shapes.keys():
        return
    yield sides
    options = [f.name for f in fields(cls) if f.default is False] if names > sides[0].shapes.keys() else []
    for count in range(1, len(options) + 1):
        yield from filter(None, (_sides(cls, on) for on in itertools.combinations(options, count)))


def _sides(cls: Any, on: Sequence[str]) -> tuple[Side, Side] | None:
    """Return a variant at two ranks on one small layer; None where it has no rank, or starts from what such a layer lacks."""
    ranks = [f.name for f in fields(cls) if re.fullmatch(r"([a-z]+_)?r\d?", f.name) and (f.name == "r" or isinstance(f.default, int))]
    try:
        small, large = (_side(cls(**dict.fromkeys(ranks, r), **dict.fromkeys(on, True), dtype=torch.float64)) for r in (2, 4))
    except Exception:  # whatever it needs, data or other widths, such a layer lacks
        return None
    return (small, large) if ranks and alike((small.shapes, large.shapes)) else None


def _side(cfg: Any) -> Side:
    """Return a variant on a small layer, which it has been seen to run on."""
    W = Frozen(torch.randn(24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    bound = W.with_constants({name: _exact(c) for name, c in cfg.constants(W, torch.Generator().manual_seed(0)).items()})
    params = cfg.init(bound, torch.Generator().manual_seed(0))
    side = Side(cfg, bound, {name: tuple(p.shape) for name, p in params.items()})
    side.update({name: p.double() for name, p in params.items()}, W.weight[:2])
    return side


def exact_map(W: Any, uses: Any) -> Frozen:
    """Return a linear map in float64. A variant that asks for no more than its output sees a weight of rank one, which takes no memory."""
    constants = {name: _exact(c) for name, c in W.constants.items()}
    if set(uses) <= {"output", "project"}:
        column = torch.linspace(0.5, 1.5, W.out_features, dtype=torch.float64, device=W.device)
        return Frozen(column[:, None].expand(-1, W.in_features), None, constants)
    return Frozen(W.dense(torch.float64), None if W.bias is None else W.bias.detach().double(), constants)


def _exact(constant: Tensor) -> Tensor:
    return constant.double() if constant.is_floating_point() else constant
