"""The documentation is true: its examples run, every public name and variant is in it, its tables are those of the code."""

import doctest
import functools
import importlib
import pkgutil
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

import lora_lite as ll

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.parts)]
MODULES = ["lora_lite", *(m.name for m in pkgutil.walk_packages(ll.__path__, "lora_lite."))]


def blocks(page):
    """Return each ```python block of a page with the line that it starts at."""
    text = page.read_text("utf-8")
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


WITH_EXAMPLES = [page for page in PAGES if blocks(page)]


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("generate")


@pytest.fixture
def in_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The graph is captured as ever; only the back end, which would need a C++ compiler, is another.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()


def test_pages_with_examples_are_found():
    assert {page.name for page in WITH_EXAMPLES} >= {"README.md", "index.md", "quickstart.md", "gotchas.md", "adding-a-variant.md"}


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
@pytest.mark.usefixtures("in_folder")
def test_examples_of_page_run(page, monkeypatch):
    module = types.ModuleType(f"page_{page.stem}")  # a module of its own: annotations and the compiler look names up in it
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))


def test_no_block_escapes():
    """A fence in another spelling would not run, and nobody would notice."""
    for page in PAGES:
        fences = re.findall(r"^\s*```+(\S.*)$", page.read_text("utf-8"), re.MULTILINE)
        known = {
            "python",
            "bash",
            "text",
            "{eval-rst}",
            "{toctree}",
            "{families}",
            "{integrations} lora_lite",
            "{integrations} peft",
            "{literalinclude} examples/dpo.py",
            "{literalinclude} examples/request_loop.py",
            "{variants}",
            "{checks}",
            "{kind-checks}",
            "{cells}",
            "{kinds}",
            "{architectures}",
            "{costs}",
            "{rates}",
            "{members}",
            "{configs-api}",
            "{functions-api}",
            "{support} lora_lite",
            "{support} peft",
            *(f"{{variant}} {name}" for name in ll.VARIANTS),
        }
        assert set(fences) <= known, page.name


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("in_folder")
def test_doctests_of_module_pass(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_doctests_are_found():
    finder = doctest.DocTestFinder()
    with_examples = {t.name for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples}
    assert with_examples >= {"lora_lite.build.build", "lora_lite.adapt.Adapt", "lora_lite.transforms.gradients.value_and_grad"}


def public_names(module):
    names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if n[0] != "_" and not isinstance(v, types.ModuleType)]
    return {f"{module.__name__}.{name}" for name in names if not isinstance(getattr(module, name), types.ModuleType)}


@pytest.mark.parametrize("module", [ll, ll.functional, ll.testing], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api_page(module, generate):
    page = (DOCS / "api.md").read_text("utf-8")
    for name, made in (("configs-api", generate.configs_api()), ("functions-api", generate.functions_api())):
        assert f"```{{{name}}}\n```" in page
        page += made
    documented = set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", page, re.MULTILINE))
    assert public_names(module) - documented == set()


def test_every_variant_has_a_page_under_its_own_name(generate):
    pages = {page.stem: page.read_text("utf-8") for page in (DOCS / "variants").glob("*.md")}
    assert pages == {name: generate.stub(name) for name in ll.VARIANTS}, "run python docs/generate.py"


def test_every_variant_page_can_be_made(generate):
    for name, variant in ll.VARIANTS.items():
        text = generate.variant_page(name)
        assert text.startswith(generate.docstring(variant)), name
        assert (generate.formula(variant.trained) if variant.trained else "all that it has") in text, name
        assert text.count("$$") % 2 == 0, name


def test_readme_table_is_what_the_code_gives(generate):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert generate.renewed(readme) == readme, "run python docs/generate.py"


def test_results_page_is_what_the_results_files_give(generate):
    text = (DOCS / "results.md").read_text("utf-8")
    assert generate.page(text) == text, "run python docs/generate.py"


def test_no_table_has_two_rows_for_one_thing():
    for page in (DOCS / "choosing.md", DOCS / "peft.md", DOCS / "from-peft.md"):
        for block in re.findall(r"(?:^\|.*\n)+", page.read_text("utf-8"), re.MULTILINE):
            firsts = [row.split("|")[1].strip() for row in block.splitlines()[2:]]
            assert len(set(firsts)) == len(firsts), (page.name, [first for first in firsts if firsts.count(first) > 1])


def test_no_two_pages_share_a_title():
    titles = [page.read_text("utf-8").partition("\n")[0] for page in PAGES if page.parent != ROOT and page.name != "index.md"]
    assert all(title.startswith("# ") for title in titles)
    assert len(set(titles)) == len(titles)


def test_each_variant_has_one_family(generate):
    named = [name for _, names in generate.FAMILIES.values() for name in names if name in ll.VARIANTS]
    assert sorted(named) == sorted(ll.VARIANTS)


def test_table_has_a_row_for_each_variant(generate):
    rows = generate.variants_table("docs/variants/").splitlines()[2:]
    assert [row.split("](")[1].split(")")[0] for row in rows] == [f"docs/variants/{name}.md" for name in ll.VARIANTS]
    for row, v in zip(rows, ll.VARIANTS.values(), strict=True):
        assert f"{generate.formula(v.trained) if v.trained else 'all that it has'} | {generate.formula(v.macs)}" in row


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_design_page_names_files_that_exist():
    names = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", (DOCS / "design.md").read_text("utf-8")))
    assert len(names) > 10
    assert {name for name in names if not any((root / name).exists() for root in (ROOT, ROOT / "src" / "lora_lite"))} == set()


def test_readme_names_the_versions_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    tested = (ROOT / "README.md").read_text("utf-8").partition("Tested on")[2].partition("[MIT licence]")[0]
    pythons = [c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3")]
    assert all(version in tested for version in pythons)
    pinned = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "tests" / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    bounds = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        named = re.search(rf"{library}((?:(?:,| and)? \d+\.\d+)+)", tested, re.IGNORECASE)[1]
        lowest = next(bound.partition(">=")[2] for bound in bounds if bound.startswith(f"{library}>="))
        assert {lowest, pinned.get(library, lowest)} <= set(re.findall(r"\d+\.\d+", named)), library


def test_licence_of_the_metadata_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert all((ROOT / name).read_text("utf-8").startswith(f"{project['license']} License") for name in project["license-files"])
    assert project["license-files"]


def test_rows_of_reproduction_that_one_command_is_said_to_do_are_those_that_it_runs():
    """One stood among them that it does not run, and one that it runs stood behind them."""
    page, tox = ((ROOT / name).read_text("utf-8") for name in ("docs/reproduce.md", "tox.ini"))
    commands = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")][1:]
    files = [re.findall(r"bench/(\w+\.py)", command) for command in commands]
    run = set(re.findall(r"bench\{/\}(\w+\.py)", tox.partition("[testenv:bench]")[2].partition("\n[testenv:")[0]))
    assert "`python -m tox run -e bench` does the first seven rows" in page
    assert {name for row in files[:7] for name in row} | {"report.py"} == run
    assert not run & {name for row in files[7:] for name in row}


def test_readme_gives_the_two_commands():
    readme = (ROOT / "README.md").read_text("utf-8")
    for env in ("demo", "test"):
        assert f"\npython -m pip install tox && python -m tox run -e {env}\n" in readme
        assert f"[testenv:{env}]" in (ROOT / "tox.ini").read_text("utf-8")


def test_code_of_tables_can_be_read(generate):
    assert generate.formula("r * (i + o)") == "`r * (i + o)`"
    assert generate.formula("{'a': r + r, 'b': i}[core]") == "by `core`: a `r + r`; b `i`"
    assert generate.formula("{'a': 1}[core] * o") == "`{'a': 1}[core] * o`"
    matrix = importlib.import_module("matrix")
    assert (matrix.code("a b"), matrix.code("no `a`")) == ("`a b`", "`` no `a` ``")
