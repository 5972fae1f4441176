"""Turn results files into the tables of README and docs/results.md, and into plots: the one place for that.

python bench/report.py             # from the newest file of each kind: README.md, docs/results.md, docs/plots
python bench/report.py --quick     # from what --quick wrote: the same text to the screen, plots to a temporary folder
python bench/report.py --compare results/a-speed.json results/b-speed.json    # where two runs differ beyond their spread
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tables as t
from agreement import compared, told
from tables import RESULTS, Found, newest

ROOT = Path(__file__).parent.parent
NONE = "No results file yet."
README, PAGE, PLOTS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "plots"
MARGIN = {"pissa": 1.15, "corda": 1.15, "lora_ga": 1.15, "asvd": 1.15}
"""How far the increment form may lie above PEFT's residual form: two products instead of one, for an exact start and quantised bases."""

COPIED = "each a few milliseconds, most of which go into copies of the module tree; PEFT changes the model that it is given"
WHY = {
    **{(name, "init"): COPIED for name in ("ia3", "ia3_ff", "hra", "road", "ln_tuning")},
    ("lora_ga", "init"): "its singular vectors are exact, PEFT's those of a randomised iteration",
}
"""Why a variant is costlier where it is."""


def costlier(speed: Found | None, memory: Found | None) -> list[str]:
    """Say which variants are slower or larger than PEFT's beyond the spread, and beyond the margin of increment forms; and why."""
    said: dict[str, list[str]] = {"": []}
    for name, row in (speed["results"]["models"]["variants"] if speed else {}).items():
        limit = MARGIN.get(name, 1.0)
        for what in ("forward", "step", "init"):
            ratio = row.get(what, {}).get("over_peft")
            if ratio and ratio["low"] > limit:
                claim = f"{t.title(name)}'s {what} takes {t.spread(ratio)} of PEFT's time"
                said.setdefault(WHY.get((name, what), ""), []).append(claim)
    for name, row in (memory["results"]["variants"] if memory else {}).items():
        step = row["step"]
        if "peft" in step and step["ours"] > 1.005 * MARGIN.get(name, 1.0) * step["peft"]:
            said[""].append(f"{t.title(name)}'s step takes {step['ours'] / step['peft']:.2f} of PEFT's peak memory")
    return said.pop("") + [f"{', '.join(claims)} ({why})" for why, claims in said.items()]


def verdict(speed: Found | None, memory: Found | None, quality: Found | None) -> str:
    """State in words what the tables show against us, or that nothing does."""
    words, worse = [], costlier(speed, memory)
    if worse:
        words.append(f"Costlier than PEFT's beyond the spread: {'; '.join(worse)}.")
    elif speed or memory:
        words.append(
            "No variant is slower or larger than PEFT's same method beyond the spread, "
            f"{max(MARGIN.values())} for increment forms, which take two products for PEFT's one."
        )
    if quality:
        apart = [t.title(n) for n, row in quality["results"]["variants"].items() if row.get("agree") is False]
        words.append(
            f"PEFT's own training reaches another accuracy, beyond two standard errors: {', '.join(apart)}."
            if apart
            else "PEFT's own training reaches the same accuracy, within two standard errors, for every method that it has."
        )
    return " ".join(words)


def sections(folder: Path = RESULTS, up: str = "../") -> Iterator[tuple[str, str]]:
    """Give the parts of docs/results.md as marker and text."""
    yield "overview", overview(folder, up)
    makers: list[tuple[str, str, Callable[[Found], str]]] = [
        ("steps", "speed", lambda f: f"{t.step_table(f)}\n\n![Time against arithmetic](plots/arithmetic.svg)"),
        ("quality", "quality", lambda f: f"{t.quality_table(f)}\n\n![Accuracy against trained parameters](plots/accuracy.svg)"),
        ("memory", "memory", t.memory_table),
        ("scaling", "scaling", lambda f: "![Cost as rank, width, batch and members grow](plots/scaling.svg)"),
        ("functions", "speed", t.functions_table),
        ("compiled", "speed", t.compiled_table),
        ("populations", "speed", t.populations_table),
        ("quantised", "quantised", t.quantised_table),
        ("serving", "serving", t.serving_table),
        ("gpu", "speed-cuda", lambda f: f"{t.gpu_table(f)}\n\n{verdict(f, None, None)}"),
        ("gpu-quantised", "quantised-cuda", t.quantised_table),
        ("gpu-serving", "serving-cuda", t.serving_table),
        ("agreement", "agreement", t.agreement_table),
        ("demo", "demo", t.demo_table),
    ]
    for marker, kind, make in makers:
        found = newest(kind, folder)
        yield marker, f"{make(found)}\n\nFrom {t.source(found, up)}." if found else NONE
    yield "gsm8k", t.gsm8k_table(folder, up) or NONE


def overview(folder: Path = RESULTS, up: str = "") -> str:
    """Give the part that README shows: the main table, its conditions, and what it shows against us."""
    speed, memory, quality = (newest(kind, folder) for kind in ("speed", "memory", "quality"))
    if speed is None:
        return NONE
    return "\n\n".join([t.main_table(speed, memory, quality), verdict(speed, memory, quality), t.conditions(speed, quality, up)])


def between(text: str, marker: str, new: str) -> str:
    """Give `text` with `new` between `<!-- marker -->` and `<!-- /marker -->`."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f'report: expected a line "{start}" and a later "{end}", found not both. Put them where the part belongs.')
    return f"{head}{start}\n\n{new}\n\n{end}{tail}"


def page(text: str, folder: Path = RESULTS) -> str:
    """Give docs/results.md's text with its parts renewed."""
    for marker, new in sections(folder):
        text = between(text, marker, new)
    return text


def compare(a: Path, b: Path) -> None:
    """Print where two runs differ beyond the spread that they state."""
    print(told(compared(*(json.loads(path.read_text("utf-8"))["results"] for path in (a, b)))))


def main() -> None:
    """Renew README, page and plots; or show the quick results; or compare two files."""
    from plots import draw  # here, since the tables need no plotting library

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
        README.write_text(between(README.read_text("utf-8"), "results", overview()), "utf-8")
        PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
        print("wrote", README.name, PAGE.name, *(p.name for p in draw(RESULTS, PLOTS)))


if __name__ == "__main__":
    main()
