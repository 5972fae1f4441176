"""Write what the documentation takes from the code and from results files: `python docs/generate.py` renews README.md.

The table of variants is read from `VARIANTS`, the facts of the config classes and the docstrings of their modules; figures from the
newest files in `bench/results`. README.md keeps both between markers; the documentation's directives (`_ext/from_code.py`) ask
for them at each build.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.testing import CHECKS

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent.parent / "bench" / "results"

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


def table(rows: list[dict[str, str]]) -> str:
    """Lay out rows with the same headings as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def variants_table(pages: str) -> str:
    """Give the table of variants; `pages` is the way to the folder of their pages."""
    variants = ll.VARIANTS.items()
    return table([{"variant": f"[{title(v)}]({pages}{n}.md): {summary(v)}", **facts(v), "paper": paper(v)} for n, v in variants])


def variant_page(name: str) -> str:
    """Give the body of a variant's page: its docstring, its facts, and the way to its function and config."""
    variant = ll.VARIANTS[name]
    ways = f"Function: {{py:func}}`lora_lite.functional.{name}`. Config: {{py:class}}`lora_lite.{variant.__name__}`."
    return "\n\n".join([docstring(variant), table([facts(variant)]), ways])


def checks_table() -> str:
    """Give the checks of the conformance kit, a line each."""
    return table([{"check": f"`{name}`", "what holds": (check.__doc__ or "").strip()} for name, check in CHECKS.items()])


def newest(name: str) -> dict[str, Any]:
    """Read the newest results file of a benchmark; its date comes first in the name."""
    files = sorted(RESULTS.glob(f"*-{name}.json"))
    if not files:
        raise ValueError(f"bench/results: expected a file of the benchmark {name}, found none. Run it first.")
    return {"file": files[-1].name, **json.loads(files[-1].read_text("utf-8"))}


def demo_table() -> str:
    """Give the demo's outcome: what each variant learned, and what its step cost."""
    found = newest("demo")
    rows = [
        {
            "variant": title(ll.VARIANTS[o["variant"]]),
            "trained": f"{o['trained']:,}",
            "exact before": f"{o['before']:.1%}",
            "exact after": f"{o['after']:.1%} ± {o['error']:.1%}",
            "step / frozen step": f"{o['ratio']:.2f}",
            "init, s": f"{o['init']:.2f}",
        }
        for o in found["results"]["outcomes"]
    ]
    words = (
        f"{found['results']['test']} unseen word problems after {found['results']['steps']} steps of {found['results']['rows']} rows, one "
        "seed, "
        f"± the standard error of the test sample; {found['threads']} threads ([`{found['file']}`](bench/results/{found['file']}), "
        "renewed by `python -m tox run -e demo -- --write`)."
    )
    return f"{words}\n\n{table(rows)}"


def speed_table() -> str:
    """Give the cost of a training step beside the frozen base's and PEFT's."""
    found = newest("cpu")
    step, peak = found["results"]["step"], found["results"]["memory"]["peak_bytes"]
    rows = []
    for name, over_peft in step["over_peft"].items():
        rows.append(
            {
                "variant": title(ll.VARIANTS[name]),
                "step / frozen step": f"{step['over_frozen'][name]['median']:.2f}",
                "by arithmetic alone": f"{step['by_arithmetic'][name]:.2f}",
                "PEFT / frozen step": f"{step['over_frozen'][f'peft {name}']['median']:.2f}",
                "step / PEFT's, quartiles": f"{over_peft['median']:.2f} [{over_peft['low']:.2f}, {over_peft['high']:.2f}]",
                "peak memory / PEFT's": f"{peak[name] / peak[f'peft {name}']:.2f}",
            }
        )
    words = (
        f"One training step of a {step['layers']}-layer Llama of width {step['width']}, r={step['r']}, all linear layers, "
        f"{step['rows']} rows of {step['tokens']} tokens, {found['threads']} thread, medians of {over_peft['n']} interleaved rounds "
        f"([`{found['file']}`](bench/results/{found['file']}), renewed by `python -m tox run -e bench`)."
    )
    many = [
        {"one step, LoRA, two threads": name, "time / a loop's, quartiles": f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"}
        for name, r in found["results"]["populations"].items()
    ]
    return f"{words}\n\n{table(rows)}\n\nMany adapters in one mixed batch, same model and file:\n\n{table(many)}"


def between(text: str, marker: str, new: str) -> str:
    """Give `text` with `new` between `<!-- marker -->` and `<!-- /marker -->`."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f'README.md: expected a line "{start}" and a later "{end}", found not both. Put them where the table belongs.')
    return f"{head}{start}\n\n{new}\n\n{end}{tail}"


def renewed(text: str) -> str:
    """Give README.md's text with its generated parts renewed."""
    text = between(text, "variants", variants_table("docs/variants/"))
    return between(text, "results", f"{demo_table()}\n\n{speed_table()}")


if __name__ == "__main__":
    README.write_text(renewed(README.read_text("utf-8")), "utf-8")
