"""Results files that are whole at any moment: each figure is on the disk before the next is measured. The standard library is enough."""

import datetime
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKS = ("date", "written", "results")
"""The keys of a results file beside the facts that its figures depend on."""


def file_name(date: str, facts: Mapping[str, Any], kind: str) -> str:
    """Return a results file's name: date, commit and kind, on a GPU `<kind>-cuda`, never in the place of a CPU's.

    It has letters, digits, `-`, `_` and `.` alone, which every system copies.
    """
    kind = f"{kind}-cuda" if facts.get("device") == "cuda" else kind
    return re.sub(r"[^A-Za-z0-9._-]", ".", f"{date}-{facts['commit']}-{kind}.json")


def now() -> str:
    """Return the moment as results files have it, which orders those of one day: a copied file has the time of its copy."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def put(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file so that whoever reads it, whenever the writer ends, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(tree, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def described(e: BaseException) -> str:
    """Return an error's type and message in one line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


class Record:
    """A results file in the making.

    Where one of the same facts stands at `path` it is continued: what it has need not be measured again.

    Args:
        path: the file.
        date: the day of the measurement.
        facts: commit, versions, machine: what the figures depend on. A file of other facts begins anew.
    """

    def __init__(self, path: Path, date: str = "", facts: Mapping[str, Any] | None = None) -> None:
        self.path = path
        facts = json.loads(json.dumps(dict(facts or {})))
        old = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        same = {key: value for key, value in old.items() if key not in MARKS} == facts
        self.tree = old if same and "results" in old else {"date": date, "written": "", **facts, "results": {}}

    def __contains__(self, keys: tuple[str, ...]) -> bool:
        """Whether a figure is kept at these keys."""
        found = self.tree["results"]
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                return False
            found = found[key]
        return True

    def keep(self, keys: tuple[str, ...], value: Any) -> None:
        """Add a figure under keys, from the outermost on; it is on the disk when this returns."""
        *outer, last = ("results", *keys)
        place = self.tree
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
        self.tree["written"] = now()
        put(self.path, self.tree)
