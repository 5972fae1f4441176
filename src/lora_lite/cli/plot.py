"""Plot the norm and the effective rank of the updates by depth."""

import argparse
import importlib
import re
import tempfile
from pathlib import Path
from typing import Any

from lora_lite.cli.opened import opened
from lora_lite.cli.table import Row, rows_of
from lora_lite.files.durable import replace, require_free

DESCRIPTION = """\
Plot the Frobenius norm and the effective rank of an adapter's updates over the depth of the layers, a line for each layer of a block.
It needs matplotlib. The base model is needed where an update depends on its weights.
"""
EXAMPLE = "example:\n  lora-lite plot adapter.safetensors adapter.png"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that ll.save, kohya or diffusers wrote, or a folder of PEFT's")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the image to write: png, svg or pdf; it must not exist yet")
    parser.add_argument("--prefix", metavar="NAME", help="the part of a pipeline in files of image tools, e.g. lora_te1, unet")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base model: a folder with safetensors files, or one such file")


def run(args: argparse.Namespace) -> None:
    """Write the image."""
    if args.out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f'expected an image to write, OUT.png, OUT.svg or OUT.pdf, found "{args.out}". Add the ending.')
    require_free(args.out)
    try:
        Figure: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as e:
        raise ModuleNotFoundError(
            "expected matplotlib, which draws the plot, found it not installed. Install it: pip install matplotlib."
        ) from e
    found = opened([args.file], args.base, args.prefix)
    rows = rows_of(found.adapts[0], found.trees[0], found.based, not args.quiet)
    if all(row.norm is None for row in rows):
        raise ValueError(f'expected updates that "{args.file}" tells by itself, found that all depend on the weights. Pass --base MODEL.')
    figure = Figure(figsize=(8, 6), layout="constrained")
    drawn(figure, rows, args.file.name)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", suffix=".tmp", dir=args.out.parent) as folder:
        figure.savefig(Path(folder) / args.out.name, dpi=150)
        replace([(Path(folder) / args.out.name, args.out)])
    print(f"{len(rows)} layers drawn in {args.out}")


def drawn(figure: Any, rows: list[Row], title: str) -> None:
    """Draw both panels."""
    panels = figure.subplots(2, 1, sharex=True)
    for panel, field, label in zip(panels, ("norm", "rank"), ("norm of the update", "effective rank")):
        for name, points in by_layer(rows, field).items():
            panel.plot(*zip(*points), marker=".", label=name)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_title(title)
    panels[0].legend(fontsize="x-small", ncols=2)
    panels[1].set_xlabel("block")


def by_layer(rows: list[Row], field: str) -> dict[str, list[tuple[int, float]]]:
    """Return `(block, value)` of layers whose paths differ in one number, by the path without it. Layers outside of blocks stand at 0."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value = getattr(row, field)
        if value is not None:
            number = re.search(r"(?<![^.])\d+(?![^.])", row.path)
            name = row.path if number is None else row.path[: number.start()] + "*" + row.path[number.end() :]
            found.setdefault(name or "(the model)", []).append((int(number[0]) if number else 0, value))
    return found
