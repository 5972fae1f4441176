"""The size and the effective rank of an adapter's update at each layer."""

import math
from typing import NamedTuple

import torch

from lora_lite.adapt import Adapt
from lora_lite.cli.opened import of_weight
from lora_lite.core.plan import Target
from lora_lite.core.progress import shown
from lora_lite.core.tree import Tree
from lora_lite.transforms.product import Matrix, Product
from lora_lite.transforms.updates import factored_update_of, norm


class Row(NamedTuple):
    """A layer in numbers.

    Attributes:
        path: its path in the model.
        variant: the variant's name.
        shape: `(o, i)`, its output and input width.
        params: number of trained values, without those that layers share.
        norm: Frobenius norm of the update of weight and bias; None where the files do not tell.
        relative: the same over that of the weight; None without the base model.
        rank: effective rank of the update; None where the files do not tell.
    """

    path: str
    variant: str
    shape: tuple[int, int]
    params: int
    norm: float | None
    relative: float | None
    rank: float | None


def rows_of(adapt: Adapt, tree: Tree, based: bool, progress: bool = True) -> list[Row]:
    """Return a row for each target, in the model's order."""
    return [_row(adapt, tree, target, based) for target in shown(adapt.targets, "info", progress)]


def _row(adapt: Adapt, tree: Tree, target: Target, based: bool) -> Row:
    plan = adapt._plan
    cfg = next(cfg for own, cfg in plan.entries if own.path == target.path)
    first = Row(target.path, cfg.name, (target.o, target.i), sum(t.numel() for t in tree.get(target.path, {}).values()), None, None, None)
    try:
        if not cfg.linear or (not based and of_weight(adapt, tree, target)):
            return first
        W = plan.layer(target, cfg)
        update = factored_update_of(W, cfg, plan.leaves(tree, target.path, cfg))
    except (ValueError, RuntimeError, KeyError, AttributeError):  # of a layer that the outline does not have as the model has it
        if based:
            raise
        return first
    size = norm(update.values())
    weight = float(W.dense(torch.float32).norm()) if based and cfg.adapts == "linear" else 0.0
    matrices = [t for name, t in update.items() if name.startswith("weight") and len(t.shape) == 2]
    return first._replace(norm=size, relative=size / weight if weight else None, rank=effective_rank(matrices))


def effective_rank(matrices: list[Matrix]) -> float | None:
    """Return the effective rank of matrices side by side in blocks, `exp(H)` of their normalised singular values; 0 for zeros.

    Source: Roy, Vetterli, *The effective rank: A measure of effective dimensionality*, EUSIPCO 2007, eq. (4).
    """
    if not matrices:
        return None
    cores = [t.core()[1] if isinstance(t, Product) else t.float() for t in matrices]
    values = torch.cat([torch.linalg.svdvals(core).double() for core in cores])
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values / total
    return math.exp(float(torch.special.entr(shares).sum()))


def text(rows: list[Row], params: int) -> str:
    """Lay the rows out as a table, with a line of totals. A dash stands where the files do not tell."""
    cells: list[tuple[str, ...]] = [("layer", "variant", "(o, i)", "params", "norm", "relative", "eff. rank")]
    for row in rows:
        numbers = (_number(row.norm, ".4g"), _number(row.relative, ".3g"), _number(row.rank, ".2f"))
        cells.append((row.path or "(the model)", row.variant, f"({row.shape[0]}, {row.shape[1]})", f"{row.params:,}", *numbers))
    known = [row.norm for row in rows if row.norm is not None]
    total = math.hypot(*known) if len(known) == len(rows) else None
    cells.append((f"{len(rows)} layers", "", "", f"{params:,}", _number(total, ".4g"), "", ""))
    if all(row.relative is None for row in rows):
        cells = [(*line[:5], line[6]) for line in cells]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) if k < 3 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths))).rstrip() for line in cells]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
