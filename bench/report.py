"""Turn results files into the tables of README and docs/results.md, and into plots: the one place for that.

python bench/report.py             # from the newest file of each kind: README.md, docs/results.md, docs/plots
python bench/report.py --quick     # from what --quick wrote: the same text to the screen, plots to a temporary folder
python bench/report.py --compare results/a-speed.json results/b-speed.json    # where two runs differ beyond their spread
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common.tables as t
from agreement import compared, told
from common import learned, many
from common.tables import RESULTS, Found, newest, title

ROOT = Path(__file__).parent.parent
NONE = "No results file yet."
README, PAGE, PLOTS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "plots"
SUPPORT = ROOT / "docs" / "support.json"
CALLS = """## Calls

The price of a call, where arithmetic takes next to no time: a chain of narrow layers, ours and PEFT's same method in turn in one
process, with the same numbers in both. The products by themselves are the least that LoRA's layer could take."""
"""The head of a section that is shown only where there is a results file of it."""
PART_OF: dict[str, tuple[str, ...]] = {
    **{"gpu": ("models", "variants"), "gpu-compiled": ("variants",), "gpu-memory": ("variants",), "gpu-populations": ("populations",)},
    **{"symbolic": ("variants",), "real-costs": ("variants",)},
}
"""The keys that a file must have for a section, where a run may have written some of it or been cut off."""
SEVERAL = ("symbolic-cuda", "compiled-cuda", "compiled", "real-costs")
"""The kinds whose rows may lie in several files, of some variants each."""
COPIED = "each a few milliseconds, most of which go into copies of the module tree; PEFT changes the model that it is given"
WHY = {
    **{(name, "init"): COPIED for name in ("ia3", "ia3_ff", "hra", "road", "ln_tuning")},
    ("lora_ga", "init"): "its singular vectors are exact, PEFT's those of a randomised iteration",
}
"""Why a variant is costlier where it is."""


def costlier(speed: Found | None, memory: Found | None) -> list[str]:
    """Return the variants that are slower or larger than PEFT's beyond the spread, in words, and why."""
    said: dict[str, list[str]] = {"": []}
    for name, row in (speed["results"]["models"]["variants"] if speed else {}).items():
        for what in ("forward", "step", "init"):
            ratio = row.get(what, {}).get("over_peft")
            if ratio and ratio["low"] > 1.0:
                claim = f"{t.title(name)}'s {what} takes {t.spread(ratio)} of PEFT's time"
                said.setdefault(WHY.get((name, what), ""), []).append(claim)
    for name, row in (memory["results"]["variants"] if memory else {}).items():
        step = row["step"]
        if "peft" in step and step["ours"] > 1.005 * step["peft"]:
            said[""].append(f"{t.title(name)}'s step takes {step['ours'] / step['peft']:.2f} of PEFT's peak memory")
    return said.pop("") + [f"{', '.join(claims)} ({why})" for why, claims in said.items()]


def verdict(speed: Found | None, memory: Found | None, quality: Found | None) -> str:
    """State in words where the tables speak against us, if they do."""
    words, worse = [], costlier(speed, memory)
    if worse:
        words.append(f"Costlier than PEFT's beyond the spread: {'; '.join(worse)}.")
    elif speed or memory:
        words.append("No variant is slower or larger than PEFT's same method beyond the spread.")
    if quality:
        apart = [t.title(n) for n, row in quality["results"]["variants"].items() if row.get("agree") is False]
        words.append(
            f"PEFT's own training reaches another accuracy, beyond two standard errors: {', '.join(apart)}."
            if apart
            else "PEFT's own training reaches the same accuracy, within two standard errors, for every method that it has."
        )
    return " ".join(words)


def sections(folder: Path = RESULTS, up: str = "../") -> Iterator[tuple[str, str]]:
    """Return the parts of docs/results.md as marker and text."""
    yield "overview", overview(folder, up)
    calls = newest("calls", folder)
    yield "calls", f"{CALLS}\n\n{t.calls_tables(calls)}\n\nFrom {t.source(calls, up)}." if calls else ""
    makers: list[tuple[str, str, Callable[[Found], str]]] = [
        ("steps", "speed", lambda f: f"{t.step_table(f)}\n\n![Time against arithmetic](plots/arithmetic.svg)"),
        ("quality", "quality", lambda f: f"{learned.quality_table(f)}\n\n![Accuracy against trained parameters](plots/accuracy.svg)"),
        ("glosses", "glosses", lambda f: f"{learned.glosses_table(f)}\n\n![Accuracy against trained parameters](plots/glosses.svg)"),
        ("memory", "memory", t.memory_table),
        ("real-costs", "real-costs", t.real_costs_tables),
        ("svd-starts", "svd-starts", t.svd_starts_table),
        ("scaling", "scaling", lambda f: "![Cost as rank, width, batch and members grow](plots/scaling.svg)"),
        ("functions", "speed", t.functions_table),
        ("compiled", "compiled" if newest("compiled", folder) else "speed", t.compiled_table),
        ("populations", "speed", many.populations_table),
        ("quantised", "quantised", t.quantised_table),
        ("serving", "serving", many.serving_table),
        ("gpu", "speed-cuda", lambda f: f"{t.gpu_table(f)}\n\n{verdict(f, None, None)}"),
        ("gpu-compiled", "compiled-cuda", t.compiled_table),
        ("gpu-memory", "memory-cuda", t.memory_table),
        ("gpu-populations", "speed-cuda", many.populations_table),
        ("gpu-quantised", "quantised-cuda", t.quantised_table),
        ("gpu-serving", "serving-cuda", many.serving_table),
        ("versions", "versions", t.versions_table),
        ("agreement", "agreement", t.agreement_table),
        ("demo", "demo", learned.demo_table),
        ("symbolic", "symbolic-cuda", learned.symbolic_table),
    ]
    for marker, kind, make in makers:
        found = t.together(kind, folder) if kind in SEVERAL else newest(kind, folder)
        found = found if found and t.has(found, *PART_OF.get(marker, ())) else None
        threads = many.population_threads(found) if found and marker == "populations" else None
        text = make(found) if found else t.NOTHING
        yield marker, f"{text}\n\nFrom {t.source(found, up, threads)}." if found and text != t.NOTHING else NONE
    yield "gsm8k", learned.gsm8k_table(folder, up) or NONE


TELLING = ("lora", "dora", "hra", "boft", "lokr", "hira")
"""The variants whose steps README tells."""


def headlines(folder: Path = RESULTS, support: Path = SUPPORT) -> str:
    """Return README's figures, each with the way to where it stands."""
    speed, memory, serving, glosses = (newest(kind, folder) for kind in ("speed", "memory", "serving", "glosses"))
    lines = []
    if speed:
        rows = {n: row["step"]["over_peft"] for n, row in speed["results"]["models"]["variants"].items() if "over_peft" in row["step"]}
        slower = {n: f"{t.title(n)} {ratio['median']:.2f}" for n, ratio in rows.items() if ratio["low"] > 1.0}
        told = ", ".join(f"{t.title(n)} {rows[n]['median']:.2f}" for n in TELLING if n in rows)
        end = f"slower beyond the spread: {', '.join(slower.values())}" if slower else "none of them is slower beyond the spread"
        lines.append(f"**A training step over PEFT's**, {len(rows)} methods in one run: {told}; {end} ([time](docs/results.md#time)).")
    if memory:
        rows = {n: row["step"]["ours"] / row["step"]["peft"] for n, row in memory["results"]["variants"].items() if "peft" in row["step"]}
        told = ", ".join(f"{t.title(n)} {rows[n]:.2f}" for n in TELLING if n in rows)
        larger = [f"{t.title(n)} {ratio:.2f}" for n, ratio in rows.items() if ratio > 1.005]
        end = f"larger: {', '.join(larger)}" if larger else "none is larger"
        lines.append(f"**Its peak memory over PEFT's**: {told}; {end} ([memory](docs/results.md#memory)).")
    if serving:
        told = serving["results"]["throughput"]
        ours, theirs = (told["requests_per_second"][way]["median"] for way in ("mixed", "peft set_adapter"))
        lines.append(
            f"**{told['requests']} requests for {told['adapters']} adapters**: {ours:.0f} a second in one mixed batch, "
            f"{theirs:.0f} with PEFT's `set_adapter` ([serving](docs/results.md#serving))."
        )
    if glosses:
        done = {n: row for n, row in glosses["results"]["variants"].items() if "agree" in row}
        equal = sum(row["agree"] for row in done.values())
        lora = done.get("lora")
        told = f"LoRA {t.share(lora['ours'])}, PEFT's {t.share(lora['peft'])}; " if lora else ""
        lines.append(
            f"**What is learned on a pretrained encoder**: {told}within two standard errors of PEFT's training for {equal} of "
            f"{len(done)} methods ([a pretrained model](docs/results.md#a-pretrained-model-on-real-data))."
        )
    if support.is_file():
        cells = json.loads(support.read_text("utf-8"))["results"]
        right = {side: [row["mixed"] for row in cells[side].values()] for side in ("lora_lite", "peft")}
        silent = sum(cell.startswith("wrong numbers") for cell in right["peft"])
        ours, theirs = (f"{side.count('ok')} of {len(side)}" for side in right.values())
        lines.append(
            f"**Rows of one batch through different adapters**: right for {ours} variants; in PEFT for {theirs} methods, and {silent} give "
            "wrong numbers without an error ([support](docs/support.md))."
        )
    return "\n".join(f"- {line}" for line in lines) or NONE


def overview(folder: Path = RESULTS, up: str = "") -> str:
    """Return the main table, its conditions, and the figures that speak against us."""
    speed, memory, quality = (newest(kind, folder) for kind in ("speed", "memory", "quality"))
    if speed is None:
        return NONE
    return "\n\n".join([t.main_table(speed, memory, quality), verdict(speed, memory, quality), t.conditions(speed, memory, quality, up)])


def between(text: str, marker: str, new: str) -> str:
    """Return `text` with `new` between `<!-- marker -->` and `<!-- /marker -->`."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f'report: expected a line "{start}" and a later "{end}", found not both. Put them where the part belongs.')
    return f"{head}{start}\n\n{new}\n\n{end}{tail}" if new else f"{head}{start}\n\n{end}{tail}"


def page(text: str, folder: Path = RESULTS) -> str:
    """Return docs/results.md's text with its parts renewed."""
    for marker, new in sections(folder):
        text = between(text, marker, new)
    return text


def compare(a: Path, b: Path) -> None:
    """Print where two runs differ beyond the spread that they state."""
    print(told(compared(*(json.loads(path.read_text("utf-8"))["results"] for path in (a, b)))))


def main() -> None:
    """Renew README, page and plots; or show the quick results; or compare two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="show the results of --quick; change no file")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two results files of one kind")
    o = parser.parse_args()
    if o.compare:
        compare(*o.compare)
    elif o.quick:
        folder = RESULTS / "quick"
        print("\n\n".join(text for _, text in sections(folder)))
        with tempfile.TemporaryDirectory() as temporary:
            print("plots:", *(p.name for p in draw(folder, Path(temporary))))
    else:
        README.write_text(between(README.read_text("utf-8"), "results", headlines()), "utf-8")
        PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
        print("wrote", README.name, PAGE.name, *(p.name for p in draw(RESULTS, PLOTS)))


STYLE = {
    **{"svg.hashsalt": "lora-lite", "svg.fonttype": "none", "figure.figsize": (6.4, 4.0), "font.size": 9, "axes.spines.top": False},
    **{"axes.spines.right": False, "legend.frameon": False, "lines.markersize": 5},
}


def accuracy(axes: Any, quality: Found) -> None:
    """Draw each variant's accuracy, a line each, in the order of trained parameters."""
    rows = sorted(quality["results"]["variants"].items(), key=lambda item: item[1]["ours"]["params"])
    for y, (_, row) in enumerate(rows):
        axes.errorbar(100 * row["ours"]["exact"], y, xerr=100 * row["ours"]["error"], fmt="o", color="tab:blue", capsize=2, lw=1)
    full, frozen = quality["results"]["full"], quality["results"]["frozen"]
    axes.axvline(100 * full["exact"], color="grey", lw=0.8, ls="--", label="full fine-tuning")
    axes.axvline(100 * frozen["exact"], color="grey", lw=0.8, ls=":", label="frozen base")
    axes.set(xlabel="exact answers, %; fewest trained parameters at the bottom")
    _lines(axes, [f"{title(name)}, {t.count(row['ours']['params'])}" for name, row in rows])


def pareto(axes: Any, found: Found) -> None:
    """Draw each variant's accuracy on the glosses, a line each; none that is filled is beaten by one with fewer trained parameters."""
    rows = [(name, row) for name, row in found["results"]["variants"].items() if "exact" in row.get("ours", {})]
    rows.sort(key=lambda item: item[1]["ours"]["params"])
    best = 0.0
    for y, (_, row) in enumerate(rows):
        ours, peft = row["ours"], row.get("peft", {})
        front, best = ours["exact"] > best, max(best, ours["exact"])
        fill = "tab:blue" if front else "white"
        axes.errorbar(100 * ours["exact"], y, xerr=100 * ours["error"], fmt="o", color="tab:blue", mfc=fill, capsize=2, lw=1)
        if "exact" in peft:
            axes.plot(100 * peft["exact"], y, "x", color="tab:orange")
    axes.plot([], [], "o", color="tab:blue", label="lora-lite; filled: no fewer parameters do better")
    axes.plot([], [], "x", color="tab:orange", label="PEFT")
    if found["results"].get("probe"):
        axes.axvline(100 * found["results"]["probe"]["exact"], color="grey", lw=0.8, ls=":", label="linear probe")
    axes.set(xlabel="right classes, %; fewest trained parameters at the bottom")
    _lines(axes, [f"{title(name)}, {t.count(row['ours']['params'])}" for name, row in rows])


def arithmetic(axes: Any, speed: Found) -> None:
    """Draw each variant's step over the frozen step, a line each: by its multiply-adds alone, ours, and PEFT's."""
    rows = sorted(speed["results"]["models"]["variants"].items(), key=lambda item: item[1]["step"]["over_frozen"]["median"])
    for y, (_, row) in enumerate(rows):
        step = row["step"]
        ours, peft = step["over_frozen"], step.get("peft_over_frozen")
        axes.plot([ours["low"], ours["high"]], [y, y], color="tab:blue", lw=1)
        axes.plot(ours["median"], y, "o", color="tab:blue")
        axes.plot(step["by_arithmetic"], y, "|", color="black")
        if peft:
            axes.plot(peft["median"], y, "x", color="tab:orange")
    for mark, color, what in (("o", "tab:blue", "lora-lite"), ("x", "tab:orange", "PEFT"), ("|", "black", "by arithmetic alone")):
        axes.plot([], [], mark, color=color, label=what)
    axes.set(xlabel="step / frozen step", xscale="log")
    ticks = [1, 1.5, 2, 3, 5, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _lines(axes, [title(name) for name, _ in rows])


def _lines(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(axis="y", lw=0.3)
    axes.figure.set_figheight(1.2 + 0.17 * len(names))
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12 * 8 / axes.figure.get_figheight()), ncols=3)


def scaling(figure: Any, found: Found) -> None:
    """Draw cost as rank, width, batch, members and the rows of each grow, a panel each."""
    names = {
        "rank": "rank",
        "width": "width",
        "rows": "rows of a batch",
        "members": "members of a mixed batch",
        "each": "rows of each member",
        "few": "members of one row of 16 tokens",
    }
    axes_of = found["results"]["axes"]
    panels = list(figure.subplots(-(-len(axes_of) // 2), 2).flat)
    for axes in panels[len(axes_of) :]:
        axes.remove()
    for (axis, lines), axes in zip(axes_of.items(), panels):
        for name, points in lines.items():
            x = [int(value) for value in points]
            medians, low, high = ([p[key] for p in points.values()] for key in ("median", "low", "high"))
            color = "grey" if name == "frozen base" else None
            axes.plot(x, medians, "o-", lw=1, ms=3, color=color, label=title(name))
            axes.fill_between(x, low, high, alpha=0.15, lw=0, color=color)
        axes.set(xlabel=names[axis], xscale="log", ylabel="step / loop" if axis in ("members", "each", "few") else "step / frozen step")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
    max(figure.axes, key=lambda axes: len(axes.lines)).legend(fontsize=7)


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw the plots that the newest results files in a folder allow, and return their files."""
    import matplotlib as mpl  # here, since the tables need no plotting library

    folder.mkdir(parents=True, exist_ok=True)
    speed, quality, growth = (newest(kind, results) for kind in ("speed", "quality", "scaling"))
    drawn = []
    with mpl.rc_context(STYLE):
        if quality:
            drawn.append(_saved(folder / "accuracy.svg", lambda f: accuracy(f.subplots(), quality)))
        if speed:
            drawn.append(_saved(folder / "arithmetic.svg", lambda f: arithmetic(f.subplots(), speed)))
        if real := newest("glosses", results):
            drawn.append(_saved(folder / "glosses.svg", lambda f: pareto(f.subplots(), real)))
        if growth:
            drawn.append(_saved(folder / "scaling.svg", lambda f: scaling(f, growth)))
    return drawn


def _saved(path: Path, fill: Callable[[Any], None]) -> Path:
    import matplotlib.pyplot as plt

    figure = plt.figure(layout="constrained")
    fill(figure)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
