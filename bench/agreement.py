"""Hold two runs of the benchmarks at one commit against each other: every ratio and every accuracy by the spread that both state.

Run the benchmarks, move what they wrote to a folder, run them again, then:

    python bench/agreement.py FOLDER    # the newest results against those in the folder; writes a results file
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.tables import newest, share, spread

KINDS = ("speed", "memory", "scaling", "quality", "quantised", "serving", "calls")
ABSOLUTE = ("ms", "us", "switch_ms", "peft_switch_ms", "requests_per_second")  # times and rates, which are the machine's of that hour


class Pair(NamedTuple):
    """A figure of two runs: its place in the files, whether the runs agree on it, and both values in words."""

    place: str
    agree: bool
    words: str


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two accuracies are equal within two standard errors of their difference."""
    return abs(a["exact"] - b["exact"]) <= 2 * math.hypot(a["error"], b["error"])


def figures(a: Any, b: Any, place: str = "") -> Iterator[Pair]:
    """Walk two results: ratios agree where a median lies in the other run's spread, accuracies within two standard errors."""
    if not isinstance(a, dict):
        return
    if {"median", "low", "high"} <= a.keys():
        inside = a["low"] <= b["median"] <= a["high"] or b["low"] <= a["median"] <= b["high"]
        yield Pair(place, inside, f"{spread(a)} and {spread(b)}")
    elif {"exact", "error"} <= a.keys():
        yield Pair(place, agree(a, b), f"{share(a)} and {share(b)}")
    elif a.keys() >= {"ours", "frozen"} and isinstance(a["ours"], int):  # peak bytes, which are counted
        for over in a.keys() - {"ours"}:
            first, second = a["ours"] / a[over], b["ours"] / b[over]
            yield Pair(f"{place}/over_{over}", abs(first - second) <= 0.005, f"{first:.3f} and {second:.3f}")
    for key in a.keys() & b.keys() - {*ABSOLUTE}:
        yield from figures(a[key], b[key], f"{place}/{key}")


def compared(a: Any, b: Any) -> dict[str, Any]:
    """Return how many figures two results share, and those on which they do not agree."""
    pairs = sorted(figures(a, b))
    return {"figures": len(pairs), "apart": [f"{pair.place}: {pair.words}" for pair in pairs if not pair.agree]}


def told(found: dict[str, Any]) -> str:
    """Return the outcome of a comparison in words."""
    apart: Sequence[str] = found["apart"]
    return "\n".join([f"{found['figures'] - len(apart)} of {found['figures']} figures agree within the spread that both state.", *apart])


def main() -> None:
    """Compare, print, and write the results file.

    Raises:
        SystemExit: where there is nothing to compare, or the runs are of other commits.
    """
    from common.measure import machine, write  # here, since the documentation's tables are made where no PEFT is installed

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results of another run")
    o = parser.parse_args()
    both = {kind: (found, again) for kind in KINDS if (found := newest(kind)) and (again := newest(kind, o.folder))}
    apart = {kind: [run["commit"] for run in runs] for kind, runs in both.items() if runs[0]["commit"] != runs[1]["commit"]}
    if apart or not both:
        raise SystemExit(f"agreement: expected results of one commit in both places, found {apart or 'none'}.")
    results = {kind: compared(*(run["results"] for run in runs)) for kind, runs in both.items()}
    for kind, found in results.items():
        print(f"{kind}: {told(found)}")
    commits = {kind: run["commit"] for kind, (run, _) in both.items()}
    write("agreement", {**machine(threads=1), "commits": commits}, results)


if __name__ == "__main__":
    main()
