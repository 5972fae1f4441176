"""The costs of an adapter, as counts and as a readable table."""

import re
from collections.abc import Collection
from typing import Any, cast

import torch

from lora_lite.core.certificate import Start
from lora_lite.core.plan import Plan, Shapes, Target
from lora_lite.derived.cost import macs_of
from lora_lite.layers.find import packed
from lora_lite.layers.kind import Kind
from lora_lite.layers.kinds import kind_of


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Count the numbers in one target's params."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def count_all(shapes: Shapes) -> int:
    """Count the numbers in a params tree."""
    return sum(count(leaves) for leaves in shapes.values())


def macs_by_target(plan: Plan) -> dict[str, int]:
    """Count each target's multiply-adds per token. Layers of one shape are counted once."""
    known: dict[Any, int] = {}
    counts = {}
    for target, cfg in plan.entries:
        W = plan.layer(target, cfg)
        key = (id(cfg), target.kind, target.i, target.o, W.bias is None)
        if key not in known:
            shapes = plan.leaves(plan.shapes, target.path, cfg)
            known[key] = macs_of(cfg, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, W)
        counts[target.path] = known[key]
    return counts


def model_size(plan: Plan) -> int:
    """Count the numbers of the frozen model. A packed weight counts as the matrix that it stands for."""
    sizes = {id(p): p.numel() for p in plan.base.parameters()}
    for path in packed(plan.base, "", plan.kinds):
        layer = plan.base.get_submodule(path)
        W: Any = cast("type[Kind]", kind_of(layer, plan.kinds)).at(layer, "")
        sizes[id(getattr(layer, "weight", layer))] = W.in_features * W.out_features
    return sum(sizes.values())


def table(plan: Plan, macs: dict[str, int], full: bool) -> str:
    """Lay out path, role, shape, variant, params and multiply-adds per token, with a total and its share of the model.

    In full each target has a line. Else those that differ only in the numbers of their paths share one, with their count and sums.
    """
    alike: dict[tuple[str, ...], list[Target]] = {}
    for target, cfg in plan.entries:
        path = target.path if full else _NUMBER.sub("*", target.path)
        alike.setdefault((path, ", ".join(target.shared_with), target.role, f"({target.o}, {target.i})", cfg.name), []).append(target)
    rows: list[tuple[str, ...]] = [("path", "role", "(o, i)", "variant", "count", "params", "MACs/token")]
    for (_, shared, *facts), targets in alike.items():
        path = common([t.path for t in targets]) + (f" (weight shared with {shared})" if shared else "")
        sums = sum(count(plan.shapes[t.path]) for t in targets), sum(macs[t.path] for t in targets)
        rows.append((path, *facts, *(f"{n:,}" for n in (len(targets), *sums))))
    params, size = count_all(plan.shapes), model_size(plan)
    rows.append((f"{len(plan.entries)} targets", "", "", "", f"{len(plan.entries):,}", f"{params:,}", f"{sum(macs.values()):,}"))
    if full:
        rows = [row[:4] + row[5:] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    share = [f"{100 * params / size:.3g}% of the model's {size:,} params"] if size else []
    return "\n".join([*(_line(row, widths) for row in rows), *share, *starts_line(plan.starts.values())])


def starts_line(starts: Collection[Start]) -> list[str]:
    """Return in how many targets leading singular vectors were found in which way, as a line; none where no start is made of them."""
    if not starts:
        return []
    errors = [start.error for start in starts if start.path == "krylov"]
    exact = [f"{len(starts) - len(errors)} exact"] if len(starts) > len(errors) else []
    fast = [f"{len(errors)} by a Krylov iteration, each within {max(errors):.1e} of the best of its rank"] if errors else []
    return [f"SVD of the starts: {', '.join(exact + fast)}"]


def common(paths: list[str]) -> str:
    """Return paths of equal length as one, with `*` for the parts in which they differ."""
    parts = [set(part) for part in zip(*(path.split(".") for path in paths), strict=True)]
    return ".".join(part.pop() if len(part) == 1 else "*" for part in parts)


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a path


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(row[:4], widths)]
    numbers = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:])]
    return "  ".join(words + numbers)
