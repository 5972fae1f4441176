"""Write the parts of the documentation that come from the code and from results files.

`python docs/generate.py` renews README.md, results.md and a page for each variant.

The table of variants is read from `VARIANTS`, the facts of the config classes and the docstrings of their modules; figures come from
`bench/report.py`. Both files keep them between markers; the documentation's directives (`_ext/from_code.py`) ask for the variants' at
each build.
"""

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import lora_lite as ll
from lora_lite.derived.cost import declared
from lora_lite.testing import CHECKS, KIND_CHECKS

ROOT = Path(__file__).parent.parent
README, RESULTS, PAGES = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "variants"

sys.path.append(str(ROOT / "bench"))

from common.learned import glosses_rates, rates_table  # noqa: E402
from common.many import members_table  # noqa: E402
from common.tables import newest, table  # noqa: E402
from report import NONE, between, headlines, page  # noqa: E402

WORDS = {"dense": "its dense form", "matmul": "products with it"}
"""A variant's `uses` of the weight, in words; of two the first says more."""

Variant = type[ll.AdapterConfig]


def docstring(variant: Variant) -> str:
    """Return the docstring of the module that a variant is written in: Markdown."""
    return (sys.modules[variant.__module__].__doc__ or "").strip()


def title(variant: Variant) -> str:
    """Return a variant's name as it is written in prose."""
    return docstring(variant).partition(":")[0]


def summary(variant: Variant) -> str:
    """Return a variant's description in one phrase."""
    return docstring(variant).partition(":")[2].partition("\n\n")[0].strip().rstrip(".")


def paper(variant: Variant) -> str:
    """Return the title and year of a variant's paper, as a link."""
    found = re.search(r"Paper:.*?\*(.+?)\*,\s+(\d{4}),\s+(arXiv|OpenReview):([\w.]*\w)", docstring(variant), re.DOTALL)
    if found is None:
        where = variant.__module__
        raise ValueError(f"{where}: expected a line 'Paper: authors, *title*, year, arXiv:id' in its docstring, found none. Write one.")
    name, year, site, number = found.groups()
    place = {"arXiv": "arxiv.org/abs/", "OpenReview": "openreview.net/forum?id="}[site]
    return f"[{' '.join(name.split())}](https://{place}{number}), {year}"


def start(variant: Variant) -> str:
    """Return a variant's start in words, with its default options, on which the fact may depend."""
    identity = variant().identity
    if identity is None:
        return "another model"
    return "exact" if identity == 0 else f"within {identity:g}"


def formula(expression: str) -> str:
    """Return a count as code; one that a field chooses from several, `{'a': x, 'b': y}[field]`, case by case."""
    tree = ast.parse(expression, mode="eval").body
    if not (isinstance(tree, ast.Subscript) and isinstance(tree.value, ast.Dict)):
        return f"`{expression}`"
    cases = zip(map(ast.literal_eval, filter(None, tree.value.keys)), map(ast.unparse, tree.value.values), strict=True)
    return f"by `{ast.unparse(tree.slice)}`: " + "; ".join(f"{case} `{count}`" for case, count in cases)


def facts(variant: Variant) -> dict[str, str]:
    """Return the facts that a variant's class declares, by heading."""
    return {
        "trained numbers per layer": formula(variant.trained) if variant.trained else "all that it has",
        "extra MACs per token": formula(variant.macs),
        "identity at init": start(variant),
        "needs of the weight": next((words for use, words in WORDS.items() if use in variant().uses), "nothing but its output"),
    }


def variants_table(pages: str) -> str:
    """Return the table of variants; `pages` is the way to the folder of their pages."""
    variants = ll.VARIANTS.items()
    return table([{"variant": f"[{title(v)}]({pages}{n}.md): {summary(v)}", **facts(v), "paper": paper(v)} for n, v in variants])


def costs_table(width: int = 4096) -> str:
    """Return each variant's trained numbers and multiply-adds on one square layer, from the formulas that its class declares."""
    rows = []
    for name, variant in ll.VARIANTS.items():
        if variant.trained is None or variant.adapts != "linear" or variant.tied:  # rows of a table are no update of a square layer
            continue
        fields = {f.name for f in dataclasses.fields(variant)}
        ranked = {"r": 16} if "r" in fields and (variant().r or 64) < 64 else {}  # a rank of None is no rank
        cfg = variant(**ranked)
        trained, macs = (declared(cfg, fact, width, width) for fact in ("trained", "macs"))
        sized = [field for field in ("r", "init_r", "block_size", "group_size") if getattr(cfg, field, None) is not None]
        rank = f"{sized[0]}={getattr(cfg, sized[0])}" if sized else ""
        rows.append({"variant": f"[{title(variant)}](variants/{name}.md)", "at": rank, "trained": trained, "added": macs / width**2})
    rows.sort(key=lambda row: -row["trained"])
    return table([{**row, "trained": f"{row['trained']:,}", "added": f"{row['added']:.2%}"} for row in rows])


def best_rates() -> str:
    """Return the learning rates that were best in the newest measurements: on the pretrained encoder, others on the shipped model."""
    real, small = newest("glosses"), newest("quality")
    on_real = [glosses_rates(real, "../")] if real else []
    others = [rates_table(small, "../", real["results"]["variants"] if real else ())] if small else []
    return "\n\n".join(filter(None, on_real + others)) or NONE


def members() -> str:
    """Return the time of one mixed step over a loop's in the newest measurement of growth."""
    found = newest("scaling")
    return members_table(found, "../") if found else NONE


def stub(name: str) -> str:
    """Return the file of a variant's page: its title, and the directive that fills it."""
    return f"# {title(ll.VARIANTS[name])}\n\n```{{variant}} {name}\n```\n"


def configs_api() -> str:
    """Return the API entries of the variants' configs, each with what it has of its own beside the contract."""
    contract = set(vars(ll.AdapterConfig)) - {"update"}
    entries = []
    for variant in ll.VARIANTS.values():
        own = [n for n, v in vars(variant).items() if n[0] != "_" and n not in contract and (isinstance(v, property) or callable(v))]
        members = f"\n   :members: {', '.join(own)}" if own else ""
        entries.append(f".. autoclass:: lora_lite.{variant.__name__}{members}")
    return "\n".join(["```{eval-rst}", *entries, "```"])


def functions_api() -> str:
    """Return the API entries of the pure functions."""
    return "\n".join(["```{eval-rst}", *(f".. autofunction:: lora_lite.functional.{name}" for name in ll.VARIANTS), "```"])


def variant_page(name: str) -> str:
    """Return the body of a variant's page: its docstring, its facts, and the way to its function and config."""
    variant = ll.VARIANTS[name]
    ways = f"Function: {{py:func}}`lora_lite.functional.{name}`. Config: {{py:class}}`lora_lite.{variant.__name__}`."
    return "\n\n".join([docstring(variant), table([facts(variant)]), ways])


def checks_table() -> str:
    """Return the checks of the conformance kit for variants, a line each."""
    return _checks(CHECKS)


def kind_checks_table() -> str:
    """Return the checks of the conformance kit for kinds of layers, a line each."""
    return _checks(KIND_CHECKS)


def _checks(checks: Mapping[str, Callable[..., object]]) -> str:
    return table([{"check": f"`{name}`", "what holds": (check.__doc__ or "").strip()} for name, check in checks.items()])


FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "LoRA and its starts": (
        "one low-rank update; they differ in where it begins",
        ("lora", "alora", "pissa", "olora", "mica", "corda", "asvd", "eva", "lora_ga", "loftq"),
    ),
    "Other low-rank updates": (
        "magnitude apart, ranks that move, grids, products, gates between the factors",
        ("dora", "delora", "adalora", "gralora", "loha", "lokr", "hira", "abba", "randlora", "deft", "peanut", "lily", "kasa", "glora"),
    ),
    "Very few numbers": (
        "gates, shifts, scales and vectors around what is frozen or shared",
        ("ia3", "ia3_ff", "bitfit", "ln_tuning", "vera", "pvera", "vblora", "tinylora", "unilora"),
    ),
    "Sparse, or in another domain": (
        "chosen entries, shared shards, circulant blocks, Fourier and wavelet coefficients",
        ("shira", "supertuning", "miss", "c3a", "fourierft", "waveft"),
    ),
    "Rotations and reflections": (
        "lengths and angles between features stay",
        ("oft", "boft", "hra", "road", "ether", "ether_plus", "goft", "qgoft", "psoft"),
    ),
    "In the weight's own directions": (
        "between or along its singular vectors, or in coordinates that layers share",
        ("lora_xs", "ssvd", "svft", "antipasto", "clover", "osf", "frod", "adamss"),
    ),
    "Beside weights": ("activations, tokens, whole modules", ("loreft", "tokens", "full")),
}
"""The variants by family, each family with what its members have in common."""


def families(pages: str) -> str:
    """Return the list of variants by family; `pages` is the way to the folder of their pages."""
    lines = []
    for family, (common, names) in FAMILIES.items():
        links = ", ".join(f"[{title(ll.VARIANTS[name])}]({pages}{name}.md)" for name in names if name in ll.VARIANTS)
        lines.append(f"- **{family}**, {common}: {links}")
    return "\n".join(lines)


def renewed(text: str) -> str:
    """Return README.md's text with its generated parts renewed."""
    return between(between(text, "variants", families("docs/variants/")), "results", headlines())


if __name__ == "__main__":
    for name in ll.VARIANTS:
        (PAGES / f"{name}.md").write_text(stub(name), "utf-8")
    README.write_text(renewed(README.read_text("utf-8")), "utf-8")
    RESULTS.write_text(page(RESULTS.read_text("utf-8")), "utf-8")
