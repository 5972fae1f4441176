"""The plots of docs/results.md, small SVG files that come out the same from the same results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from tables import newest, title

STYLE = {
    **{"svg.hashsalt": "lora-lite", "svg.fonttype": "none", "figure.figsize": (6.4, 4.0), "font.size": 9, "axes.spines.top": False},
    **{"axes.spines.right": False, "legend.frameon": False, "lines.markersize": 5},
}
Found = dict[str, Any]


def accuracy(axes: Any, speed: Found, quality: Found) -> None:
    """Draw accuracy against trained parameters."""
    for name, row in quality["results"]["variants"].items():
        ours = row["ours"]
        axes.errorbar(ours["params"], 100 * ours["exact"], yerr=100 * ours["error"], fmt="o", color="tab:blue", capsize=2, lw=1)
        axes.annotate(title(name), (ours["params"], 100 * ours["exact"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    full, frozen = quality["results"]["full"], quality["results"]["frozen"]
    axes.axhline(100 * full["exact"], color="grey", lw=0.8, ls="--", label="full fine-tuning")
    axes.axhline(100 * frozen["exact"], color="grey", lw=0.8, ls=":", label="frozen base")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="exact answers, %")
    axes.legend()


def arithmetic(axes: Any, speed: Found, quality: Found | None) -> None:
    """Draw a step's time against what its multiply-adds alone would give, ours and PEFT's."""
    top = 1.0
    for name, row in speed["results"]["models"]["variants"].items():
        step = row["step"]
        top = max(top, step["by_arithmetic"], step["over_frozen"]["high"])
        peft = step.get("peft_over_frozen")
        if peft:
            axes.plot([step["by_arithmetic"]] * 2, [step["over_frozen"]["median"], peft["median"]], color="lightgrey", lw=0.8, zorder=0)
            axes.plot(step["by_arithmetic"], peft["median"], "x", color="tab:orange")
        axes.plot(step["by_arithmetic"], step["over_frozen"]["median"], "o", color="tab:blue")
        place = (step["by_arithmetic"], step["over_frozen"]["median"])
        axes.annotate(title(name), place, xytext=(4, -3), textcoords="offset points", fontsize=7)
    axes.plot([1, top], [1, top], color="grey", lw=0.8, ls="--")
    axes.plot([], [], "o", color="tab:blue", label="lora-lite")
    axes.plot([], [], "x", color="tab:orange", label="PEFT")
    axes.set(xlabel="step / frozen step, by arithmetic alone", ylabel="step / frozen step, measured", yscale="log")
    axes.legend()


def scaling(figure: Any, found: Found) -> None:
    """Draw cost as rank, width, batch and members grow, a panel each."""
    names = {"rank": "rank", "width": "width", "rows": "rows of a batch", "members": "members of a mixed batch"}
    panels = figure.subplots(2, 2).flat
    for (axis, lines), axes in zip(found["results"]["axes"].items(), panels, strict=True):
        for name, points in lines.items():
            x = [int(value) for value in points]
            medians, low, high = ([p[key] for p in points.values()] for key in ("median", "low", "high"))
            axes.plot(x, medians, "o-", lw=1, ms=3, label=title(name))
            axes.fill_between(x, low, high, alpha=0.15, lw=0)
        axes.set(xlabel=names[axis], xscale="log", ylabel="step / loop" if axis == "members" else "step / frozen step")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
    figure.axes[0].legend(fontsize=7)


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw what the newest results files in a folder allow, and give the files."""
    folder.mkdir(parents=True, exist_ok=True)
    speed, quality, growth = (newest(kind, results) for kind in ("speed", "quality", "scaling"))
    drawn = []
    with mpl.rc_context(STYLE):
        if quality:
            drawn.append(_saved(folder / "accuracy.svg", lambda f: accuracy(f.subplots(), speed or {}, quality)))
        if speed:
            drawn.append(_saved(folder / "arithmetic.svg", lambda f: arithmetic(f.subplots(), speed, quality)))
        if growth:
            drawn.append(_saved(folder / "scaling.svg", lambda f: scaling(f, growth)))
    return drawn


def _saved(path: Path, fill: Callable[[Any], None]) -> Path:
    figure = plt.figure(layout="constrained")
    fill(figure)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path
