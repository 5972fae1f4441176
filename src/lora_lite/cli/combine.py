"""Combine several adapters of one base model into one."""

import argparse
from pathlib import Path

from lora_lite.cli.opened import opened, require_known
from lora_lite.cli.written import FORMS, require_form, written
from lora_lite.files.durable import require_free
from lora_lite.transforms.combine import combine
from lora_lite.transforms.merging import METHODS

DESCRIPTION = """\
Combine adapters into one, as ll.combine does: the weighted sum of their updates, or a merge by another method. The adapters may be of
different variants and forms. The base model is needed where an update depends on its weights (DoRA, PiSSA, IA3).
"""
EXAMPLE = "examples:\n  lora-lite combine a.safetensors b.safetensors both.safetensors --weights 0.7 0.3\n\
  lora-lite combine a b c merged.safetensors --method ties --density 0.5 --r 16"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="files that ll.save wrote, or folders of PEFT's")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file or folder to write; it must not exist yet")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="a weight for each adapter, of either sign; 1 by default")
    parser.add_argument("--method", default="cat", choices=sorted(METHODS), help="cat by default, the exact sum")
    parser.add_argument("--density", type=float, metavar="D", help="share of the entries that a pruning method keeps, in (0, 1]")
    parser.add_argument("--r", type=int, metavar="RANK", help="rank of the result, by default as the method gives it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the entries that dare draws; 0 by default")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base model: a folder with safetensors files, or one such file")
    parser.add_argument("--to", choices=FORMS, default="lora_lite", help="the form to write, lora_lite by default")


def run(args: argparse.Namespace) -> None:
    """Write the combined adapter."""
    require_free(args.out)
    require_form(args.to, args.out)
    weights = [1.0] * len(args.adapters) if args.weights is None else args.weights
    if len(weights) != len(args.adapters):
        raise ValueError(
            f"--weights: expected a number for each of {len(args.adapters)} adapters, found {len(weights)}. The last path is the result's."
        )
    found = opened(args.adapters, args.base)
    require_known(found, also=True)
    adapt, params, errors = combine(
        found.adapts, found.trees, weights, args.method, args.r, args.density, args.seed, progress=not args.quiet
    )
    written(adapt, params, args.to, args.out, found.based)
    print(
        f"{len(args.adapters)} adapters, {len(adapt.targets)} layers written to {args.out}; "
        f"at most {max(errors.values()):.2g} of an update is lost"
    )
