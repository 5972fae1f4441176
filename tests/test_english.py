"""Rules of plain English that a regular expression can hold: how docstrings open, and how long a sentence is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(p for folder in ("src", "bench", "docs") for p in (ROOT / folder).rglob("*.py") if "_build" not in p.parts)
PAGES = sorted((ROOT / "docs").glob("*.md"))

HEADLESS = re.compile(r"(?:Give|Tell|Say|What|One|It|Those|That|Which|Who|Whose|Where|How)\b|\w+ (?:what|those)\b")
"""An opening without a noun, or a verb whose object is none: `What a file holds`, `Return what it holds`."""
LONGEST = 30
"""Words of the longest sentence in the first paragraph of a docstring or on a page."""
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(text):
    """Yield the line and the first paragraph of each docstring, those of attributes too."""
    for node in ast.walk(ast.parse(text)):
        body = node.body if isinstance(node, DOCUMENTED) else []
        for k, part in enumerate(body):
            stands = k == 0 or isinstance(node, ast.Module | ast.ClassDef)
            if stands and isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str):
                yield part.lineno, " ".join(part.value.value.strip().split("\n\n")[0].split())


def blocks(text):
    """Yield the line and the code of each ```python block of a page."""
    for m in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, m.start(1)), m[1]


def prose(text):
    """Yield the paragraphs and list items of a page: no code, tables, headings or directives."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "\n", text, flags=re.DOTALL)  # written by bench/report.py
    text = re.sub(r"^```.*?^```$|^\|[^\n]*$|^#[^\n]*$|^\$\$.*?\$\$$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(part.split()) for part in re.split(r"\n\s*\n|\n\s*(?=- |\d+\. )", text))


def long_sentences(paragraph):
    paragraph = re.sub(r"`[^`]*`", "code", paragraph)  # a stretch of code is one word
    return [s for s in re.split(r"(?<=[.!?:])\)?\s+(?=[A-Z`(*\[]|code)", paragraph) if len(s.split()) > LONGEST]


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path):
    text = path.read_text("utf-8")
    parts = blocks(text) if path.suffix == ".md" else [(0, text)]
    found = [f"{start + line}: {first}" for start, code in parts for line, first in docstrings(code) if HEADLESS.match(first)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_paragraphs_of_docstrings_have_short_sentences(path):
    found = [f"{line}: {s}" for line, first in docstrings(path.read_text("utf-8")) for s in long_sentences(first)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_have_short_sentences(path):
    found = [s for paragraph in prose(path.read_text("utf-8")) for s in long_sentences(paragraph)]
    assert not found, "\n".join(found)
