"""The matrix of variants and transforms: every cell of ours holds, and docs/support.json says so.

python -m pytest tests/test_support_matrix.py                       # ours; compiling and quantised bases for a sample
SUPPORT=whole python -m pytest tests/test_support_matrix.py         # all of ours, minutes
python tests/test_support_matrix.py --write                         # docs/support.json: ours anew, PEFT's as it was
python tests/test_support_matrix.py --write --peft                  # PEFT's anew too
python tests/test_support_matrix.py --write --peft --only miss      # one method's
"""

import argparse
import datetime
import json
import logging
import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent / "bench"))
pytest.importorskip("bitsandbytes", reason="the matrix has cells of quantised layers")

import bitsandbytes
import peft
import torch
import transformers

import lora_lite as ll
from support_cells import CELLS, EXPECTED, PAGE, columns, kind, outcome, page
from support_subjects import ROWS

COSTLY = {"compile": ("lora", "road"), "four_bit": ("lora", "vera", "full"), "eight_bit": ("lora", "dora", "full")}
"""The sample of those cells that take seconds."""
WHOLE = os.environ.get("SUPPORT") == "whole"
RUN = [(name, cell) for name in ll.VARIANTS for cell in CELLS if WHOLE or name in COSTLY.get(cell, ll.VARIANTS)]
PEFT_SAMPLE = [("lora", "mixed"), ("ia3", "mixed"), ("dora", "mixed"), ("oft", "grad"), ("vera", "vmap_params")]


@pytest.mark.parametrize(("name", "cell"), RUN)
def test_cell_of_ours_holds_and_the_page_says_so(name, cell):
    said = outcome(CELLS[cell], ROWS["lora_lite"][name])
    assert kind(said) == EXPECTED.get((name, cell), "ok"), said
    assert kind(page()["results"]["lora_lite"][name][cell]) == kind(said)


@pytest.mark.parametrize(("name", "cell"), PEFT_SAMPLE)
def test_cell_of_pefts_is_as_the_page_says(name, cell):
    assert kind(outcome(CELLS[cell], ROWS["peft"][name])) == kind(page()["results"]["peft"][name][cell])


def main() -> None:
    """Run the matrix, print it, and write the page's file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/support.json")
    parser.add_argument("--peft", action="store_true", help="run PEFT's methods too; without it they stay as they were written")
    parser.add_argument("--only", nargs="+", choices=ll.VARIANTS, metavar="NAME", help="these alone; the rest stay as they were written")
    o = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    results: dict = {"cells": columns()}
    for library, rows in ROWS.items():
        if library == "peft" and not o.peft:
            results[library] = page()["results"][library]
            continue
        results[library] = {}
        for name, wrap in rows.items():
            if o.only and name not in o.only:
                results[library][name] = page()["results"][library][name]
                continue
            results[library][name] = found = {cell: outcome(run, wrap) for cell, run in CELLS.items()}
            other = {cell: said for cell, said in found.items() if said != "ok"}
            print(f"{library} {name}: {len(found) - len(other)} of {len(found)} ok", *(f"\n    {c}: {said}" for c, said in other.items()))
    if o.write:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, ll, bitsandbytes)}
        facts = {"date": datetime.date.today().isoformat(), "versions": versions}
        PAGE.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", "utf-8")
        print("wrote docs/support.json")


if __name__ == "__main__":
    main()
