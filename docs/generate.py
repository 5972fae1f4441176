"""Write what the documentation takes from the code and from results files: `python docs/generate.py` renews README.md and results.md.

The table of variants is read from `VARIANTS`, the facts of the config classes and the docstrings of their modules; figures come from
`bench/report.py`. Both files keep them between markers; the documentation's directives (`_ext/from_code.py`) ask for the variants' at
each build.
"""

import dataclasses
import re
import sys
from pathlib import Path

import lora_lite as ll
from lora_lite.testing import CHECKS

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"

sys.path.append(str(ROOT / "bench"))

from report import between, overview, page  # noqa: E402
from tables import table  # noqa: E402

NEEDS = {
    "nothing": "nothing but its output",
    "product": "products with it",
    "norms": "its row norms, once",
    "dense_init": "its dense form, once",
    "dense": "its dense form, in every forward",
}
"""A variant's fact `needs` in words."""

Variant = type[ll.AdapterConfig]


def docstring(variant: Variant) -> str:
    """Give the docstring of the module that a variant is written in: Markdown."""
    return (sys.modules[variant.__module__].__doc__ or "").strip()


def title(variant: Variant) -> str:
    """Give a variant's name as it is written in prose."""
    return docstring(variant).partition(":")[0]


def summary(variant: Variant) -> str:
    """Say in one phrase what a variant is."""
    return docstring(variant).partition(":")[2].partition("\n\n")[0].strip().rstrip(".")


def paper(variant: Variant) -> str:
    """Give the title and year of a variant's paper, as a link."""
    found = re.search(r"Paper:.*?\*(.+?)\*,\s+(\d{4}),\s+arXiv:([\d.]+\d)", docstring(variant), re.DOTALL)
    if found is None:
        where = variant.__module__
        raise ValueError(f"{where}: expected a line 'Paper: authors, *title*, year, arXiv:id' in its docstring, found none. Write one.")
    name, year, number = found.groups()
    return f"[{' '.join(name.split())}](https://arxiv.org/abs/{number}), {year}"


def start(variant: Variant) -> str:
    """Say where a variant starts with its default options, on which the fact may depend."""
    identity = variant().identity
    if identity is None:
        return "another model"
    return "exact" if identity == 0 else f"within {identity:g}"


def facts(variant: Variant) -> dict[str, str]:
    """Give what a variant's class declares, by heading."""
    return {
        "trained numbers per layer": f"`{variant.trained}`" if variant.trained else "all that it has",
        "extra MACs per token": f"`{variant.macs}`",
        "identity at init": start(variant),
        "needs of the weight": NEEDS[variant.needs],
    }


def variants_table(pages: str) -> str:
    """Give the table of variants; `pages` is the way to the folder of their pages."""
    variants = ll.VARIANTS.items()
    return table([{"variant": f"[{title(v)}]({pages}{n}.md): {summary(v)}", **facts(v), "paper": paper(v)} for n, v in variants])


def costs_table(width: int = 4096) -> str:
    """Give what each variant trains and adds on one square layer, from the formulas that its class declares."""
    rows = []
    for name, variant in ll.VARIANTS.items():
        if variant.trained is None or variant.adapts != "linear":
            continue
        fields = {f.name for f in dataclasses.fields(variant)}
        ranked = {"r": 16} if "r" in fields and variant().r < 64 else {}
        cfg = variant(**ranked)
        known = {**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}, "i": width, "o": width}
        trained, macs = (eval(formula, {"__builtins__": {"min": min, "max": max}}, known) for formula in (cfg.trained, cfg.macs))
        rank = next((f"{field}={getattr(cfg, field)}" for field in ("r", "init_r", "block_size", "group_size") if field in fields), "")
        rows.append({"variant": f"[{title(variant)}](variants/{name}.md)", "at": rank, "trained": trained, "added": macs / width**2})
    rows.sort(key=lambda row: -row["trained"])
    return table([{**row, "trained": f"{row['trained']:,}", "added": f"{row['added']:.2%}"} for row in rows])


def variant_page(name: str) -> str:
    """Give the body of a variant's page: its docstring, its facts, and the way to its function and config."""
    variant = ll.VARIANTS[name]
    ways = f"Function: {{py:func}}`lora_lite.functional.{name}`. Config: {{py:class}}`lora_lite.{variant.__name__}`."
    return "\n\n".join([docstring(variant), table([facts(variant)]), ways])


def checks_table() -> str:
    """Give the checks of the conformance kit, a line each."""
    return table([{"check": f"`{name}`", "what holds": (check.__doc__ or "").strip()} for name, check in CHECKS.items()])


def renewed(text: str) -> str:
    """Give README.md's text with its generated parts renewed."""
    return between(between(text, "variants", variants_table("docs/variants/")), "results", overview())


if __name__ == "__main__":
    README.write_text(renewed(README.read_text("utf-8")), "utf-8")
    RESULTS.write_text(page(RESULTS.read_text("utf-8")), "utf-8")
