"""The matrix of variants and transforms as Markdown, from `support.json`, the report of `tests/test_support_matrix.py`."""

import json
from pathlib import Path
from typing import Any

from generate import table, title

import lora_lite as ll

FILE = Path(__file__).parent / "support.json"
INTEGRATIONS = Path(__file__).parent / "integrations.json"
ARCHITECTURES = Path(__file__).parent / "architectures.json"


def report() -> dict[str, Any]:
    """Read the outcome of every cell, `ok` or the reason why not.

    Raises:
        ValueError: where the file is missing.
    """
    if not FILE.is_file():
        raise ValueError("docs/support.json: missing. Run python tests/test_support_matrix.py --write --peft.")
    return json.loads(FILE.read_text("utf-8"))


def support_table(library: str) -> str:
    """Return the matrix of `lora_lite` or `peft`, with a numbered list of the cells that do not hold."""
    found = report()
    numbers: dict[str, str] = {}

    def mark(said: str) -> str:
        return "ok" if said == "ok" else numbers.setdefault(said, str(len(numbers) + 1))

    rows = [
        {"variant": title(ll.VARIANTS[name]), **{cell.replace("_", " "): mark(said) for cell, said in cells.items()}}
        for name, cells in found["results"][library].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    reasons = "\n".join(f"{number}. {code(said)}" for said, number in numbers.items())
    return f"{table(rows)}\n\n{reasons}\n\nRun on {found['date']} ({versions})."


def code(said: str) -> str:
    """Return words as code in Markdown; they may have back-quotes themselves."""
    return f"`` {said} ``" if "`" in said else f"`{said}`"


def cells_table() -> str:
    """Return a table of the comparisons that the matrix's columns make."""
    return table([{"column": name.replace("_", " "), "what is compared": words} for name, words in report()["results"]["cells"].items()])


def kinds_table() -> str:
    """Return the grid of kinds and checks, with a numbered list of the reasons where a part is refused."""
    return _grid("kind of layer", json.loads((Path(__file__).parent / "kinds.json").read_text("utf-8")))


def integrations_table(library: str) -> str:
    """Return the grid of `lora_lite` or `peft` and other libraries, with a numbered list of what is not run or does not hold."""
    found = json.loads(INTEGRATIONS.read_text("utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    named = {title(ll.VARIANTS[name]): cells for name, cells in found["results"][library].items()}
    return f"{_grid('variant', named)}\n\nRun on {found['date']} ({versions})."


def _grid(what: str, found: dict[str, dict[str, str]]) -> str:
    numbers: dict[str, str] = {}

    def mark(said: str) -> str:
        holds, _, left = said.partition("; ") if said.startswith("ok") else ("", "", said)  # what an ok leaves out comes after it
        number = left and numbers.setdefault(left, str(len(numbers) + 1))
        return ", ".join(filter(None, (holds, number)))

    rows = [{what: name, **{check: mark(said) for check, said in checks.items()}} for name, checks in found.items()]
    return f"{table(rows)}\n\n" + "\n".join(f"{number}. {said}" for said, number in numbers.items())


def architectures_list() -> str:
    """Return the model classes that were tried, from `architectures.json`: the names of those that hold, the others with the reason."""
    found = json.loads(ARCHITECTURES.read_text("utf-8"))
    held = [name for name, said in found["results"].items() if said == "ok"]
    others = [{"class": name, "reason": code(said)} for name, said in found["results"].items() if said != "ok"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    names = ", ".join(f"`{name}`" for name in held)
    return f"{len(held)} classes hold: {names}.\n\n{table(others)}\n\nRun on {found['date']} ({versions})."
