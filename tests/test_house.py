"""The order of the packages: each imports only from those before it. `docs/design.md` says what each is for."""

import ast
import subprocess
from pathlib import Path

import pytest

import lora_lite as ll

SOURCES = Path(ll.__file__).parent
ORDER = [
    *("core", "variants", "layers", "clone", "derived", "prepare", "adapt", "build"),
    *("transforms", "files", "integrations", "testing", "functional", "__init__", "cli", "__main__"),
]


def room(name):
    """Return the package of `lora_lite`, or the module beside the packages, that a dotted name leads to."""
    return (name.split(".")[1:] or ["__init__"])[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.split(".")[0] == "lora_lite")


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCES)))
def test_each_package_imports_only_from_those_before_it(path):
    own = path.relative_to(SOURCES).with_suffix("").parts[0]
    later = {name for name in imported(path) if ORDER.index(room(name)) > ORDER.index(own)}
    assert later == set(), f"{own} stands before these in the order {ORDER}"


def test_nothing_else_stands_at_the_top():
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("the files that belong to the project are known to git")
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {name.partition("/")[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} == {"README.md", "bench", "docs", "pyproject.toml", "src", "tests", "tox.ini"}
