"""Show the variant, norms and ranks of an adapter, layer by layer."""

import argparse
import json
from pathlib import Path

from lora_lite.cli.opened import opened
from lora_lite.cli.raw import header_rows, raw_text
from lora_lite.cli.table import Row, rows_of, text
from lora_lite.core.config import AdapterConfig
from lora_lite.core.config_json import to_json

DESCRIPTION = """\
Show an adapter's variant, and for each layer its shape, the number of trained values, the Frobenius norm and the effective rank of its
update. The effective rank is exp(entropy) of the normalised singular values. A dash stands where this depends on the base model's weights;
with --base it is computed, and with it the norm relative to the weight's.
"""
EXAMPLE = "example:\n  lora-lite info adapter.safetensors"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that ll.save, kohya or diffusers wrote, or a folder of PEFT's")
    parser.add_argument("--prefix", metavar="NAME", help="the part of a pipeline in files of image tools, e.g. lora_te1, unet")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base model: a folder with safetensors files, or one such file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    try:
        found = opened([args.file], args.base, args.prefix)
    except (ValueError, RuntimeError):
        lines = None if args.base else raw_text(args.file, args.json)
        facts = None if args.base or lines else header_rows(args.file)
        if lines:
            print(lines)
        elif facts is not None:
            _print(args, *facts)
        else:
            raise
        return
    adapt, tree = found.adapts[0], found.trees[0]
    rows = rows_of(adapt, tree, found.based, not args.quiet)
    _print(args, rows, list({id(cfg): cfg for cfg in adapt.configs}.values()), adapt.num_params)


def _print(args: argparse.Namespace, rows: list[Row], configs: list[AdapterConfig], params: int) -> None:
    if args.json:
        facts = [{key: value for key, value in to_json(cfg).items() if key != "target_names"} for cfg in configs]
        print(json.dumps({"configs": facts, "params": params, "layers": [row._asdict() for row in rows]}, indent=2))
        return
    print("\n".join([*dict.fromkeys(map(_described, configs)), "", text(rows, params)]))
    if not args.quiet and any(row.norm is None for row in rows):
        print("\n-: depends on the base model. Pass it for these numbers: --base MODEL.")


def _described(cfg: AdapterConfig) -> str:
    """Return a config as one line of its own fields, without those that all configs share."""
    shared = {"name", *AdapterConfig.__dataclass_fields__}
    fields = [f"{name}={value!r}" for name, value in to_json(cfg).items() if name not in shared]
    return f"{cfg.name}({', '.join(fields)})"
