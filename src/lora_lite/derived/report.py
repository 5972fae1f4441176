"""The costs of an adapter, as counts and as a readable table."""

from typing import Any

import torch

from lora_lite.core.plan import Plan, Shapes
from lora_lite.derived.cost import macs_of


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
            shapes = {**plan.shapes.get(cfg.name, {}), **plan.shapes[target.path]}
            known[key] = macs_of(cfg, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, W)
        counts[target.path] = known[key]
    return counts


def table(plan: Plan, macs: dict[str, int]) -> str:
    """Lay out path, role, shape, variant, params and multiply-adds per token, one line for each target, with a total."""
    rows = [("path", "role", "(o, i)", "variant", "params", "MACs/token")]
    for target, cfg in plan.entries:
        path = target.path + (f" (weight shared with {', '.join(target.shared_with)})" if target.shared_with else "")
        numbers = f"{count(plan.shapes[target.path]):,}", f"{macs[target.path]:,}"
        rows.append((path, target.role, f"({target.o}, {target.i})", cfg.name, *numbers))
    total = f"{count_all(plan.shapes):,}", f"{sum(macs.values()):,}"
    rows.append((f"{len(plan.entries)} targets", "", "", "", *total))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(row[:4], widths)]
    numbers = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:])]
    return "  ".join(words + numbers)
