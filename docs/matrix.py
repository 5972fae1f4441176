"""The matrix of variants and transforms as Markdown, from the newest file that `bench/support.py` wrote."""

import json
from pathlib import Path
from typing import Any

from generate import table, title

import lora_lite as ll

FOLDER = Path(__file__).parent.parent / "bench" / "results"


def newest() -> dict[str, Any]:
    """Read the newest results file; its date comes first in the name."""
    files = sorted(FOLDER.glob("*-support.json"), key=lambda p: (p.name[:10], p.stat().st_mtime))
    if not files:
        raise ValueError("bench/results: expected a file of the support matrix, found none. Run python bench/support.py --write.")
    return {"file": files[-1].name, **json.loads(files[-1].read_text("utf-8"))}


def support_table(library: str) -> str:
    """Give the matrix of `lora_lite` or `peft`, with a numbered list of what does not hold."""
    found = newest()
    numbers: dict[str, str] = {}

    def mark(said: str) -> str:
        return "ok" if said == "ok" else numbers.setdefault(said, str(len(numbers) + 1))

    rows = [
        {"variant": title(ll.VARIANTS[name]), **{cell.replace("_", " "): mark(said) for cell, said in cells.items()}}
        for name, cells in found["results"][library].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    reasons = "\n".join(f"{number}. `{said}`" for said, number in numbers.items())
    return f"{table(rows)}\n\n{reasons}\n\nFrom `bench/results/{found['file']}` ({versions})."


def cells_table() -> str:
    """Say what each column of the matrix asks."""
    return table([{"column": name.replace("_", " "), "what is compared": words} for name, words in newest()["results"]["cells"].items()])
