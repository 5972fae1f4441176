"""Run the checks of every variant with every library, and write docs/integrations.json.

Run:
    python tests/integrations/write.py
"""

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
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "integrations.json"
MODULES = ("test_posteriors", "test_torchopt", "test_laplace", "test_kronfluence", "test_curvlinops")
LIBRARIES = ("posteriors", "torchopt", "laplace-torch", "kronfluence", "curvlinops-for-pytorch")


def outcome(checks, cfg) -> str:
    """Return `ok` where all checks of a cell hold, else the first words of the error."""
    import pytest

    try:
        for check in checks:
            with tempfile.TemporaryDirectory() as folder:
                check(cfg, *([folder] if len(inspect.signature(check).parameters) > 1 else []))
    except pytest.skip.Exception as e:
        return "ok" if check is not checks[0] else f"not run: {e.msg}"
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:120]}"
    return "ok"


def main() -> None:
    """Write the outcomes of all cells."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    from subjects import FIRST

    cells = {name: checks for module in MODULES for name, checks in importlib.import_module(module).CHECKS.items()}
    gc.freeze()
    versions = {name: importlib.metadata.version(name) for name in ("torch", *LIBRARIES)}
    facts = {"date": datetime.date.today().isoformat(), "versions": versions}
    results: dict = {}
    for row in FIRST:
        found = {name: outcome(checks, row.cfg) for name, checks in cells.items()}
        results[row.cfg.name] = found
        print(row.cfg.name, *(f"\n    {name}: {said}" for name, said in found.items() if said != "ok"), flush=True)
    PAGE.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", "utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
