"""Run the checks of every variant with every library, and of PEFT's same methods, and write docs/integrations.json.

Run:
    python tests/integrations/write.py                    # all of ours; minutes
    python tests/integrations/write.py --peft             # PEFT's
    python tests/integrations/write.py --variants lora    # single rows, of ours or of PEFT's
"""

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import inspect
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "integrations.json"
MODULES = tuple(f"test_{name}" for name in ("posteriors", "torchopt", "laplace", "kronfluence", "curvlinops", "private", "dattri"))
LIBRARIES = ("posteriors", "torchopt", "laplace-torch", "kronfluence", "curvlinops-for-pytorch", "opacus", "dattri", "peft")
LARGE = 2000
"""Params up to which a full matrix is made here; the tests stop earlier."""


def outcome(checks: Sequence[Callable[..., None]], case: Any) -> str:
    """Return `ok` where all checks of a cell hold, else the first words of the first error.

    Checks that do not apply are named: after `ok; ` where others hold, else alone.
    """
    said = {check.__name__.replace("_", " "): _one(check, case) for check in checks}
    failed = [words for words in said.values() if words != "ok" and not words.startswith("not run: ")]
    if failed:
        return failed[0]
    left = [f"{name} not run: {words.removeprefix('not run: ')}" for name, words in said.items() if words != "ok"]
    if len(left) == len(said):
        return next(iter(said.values()))
    return "; ".join(["ok", *left])


def _one(check: Callable[..., None], case: Any) -> str:
    import pytest

    try:
        with tempfile.TemporaryDirectory() as folder:
            check(case, *([folder] if len(inspect.signature(check).parameters) > 1 else []))
    except pytest.skip.Exception as e:
        return f"not run: {e.msg}"
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:120]}" if str(e).strip() else type(e).__name__
    return "ok"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", action="store_true", help="PEFT's methods in place of our variants")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="these rows alone; the others stay as they are")
    return parser.parse_args()


def main() -> None:
    """Write the outcomes of the cells that are asked for."""
    args = arguments()
    sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "bench")]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from subjects import FIRST, THEIRS

    cases = {case.cfg.name: case for case in (THEIRS if args.peft else FIRST)}
    unknown = sorted(set(args.variants or ()) - set(cases))
    if unknown:
        raise SystemExit(f"--variants: expected some of {', '.join(cases)}, found {', '.join(unknown)}.")
    modules = [importlib.import_module(module) for module in MODULES]
    importlib.import_module("test_laplace").LARGE = LARGE
    checks = [getattr(module, "OF_PEFT", module.CHECKS) if args.peft else module.CHECKS for module in modules]
    cells = {name: each for of_module in checks for name, each in of_module.items()}
    gc.freeze()
    versions = {name: importlib.metadata.version(name) for name in ("torch", *LIBRARIES)}
    before = json.loads(PAGE.read_text("utf-8"))["results"] if PAGE.is_file() else {}
    library = "peft" if args.peft else "lora_lite"
    found = dict(before.get(library, {}))
    for name, case in cases.items():
        if args.variants and name not in args.variants:
            continue
        found[name] = {cell: outcome(each, case) for cell, each in cells.items()}
        print(name, *(f"\n    {cell}: {said}" for cell, said in found[name].items() if said != "ok"), flush=True)
    results = {**before, library: {name: found[name] for name in cases if name in found}}
    facts = {"date": datetime.date.today().isoformat(), "versions": versions}
    PAGE.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", "utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
