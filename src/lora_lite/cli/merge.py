"""Merge an adapter into its base model, part by part."""

import argparse
import functools
import sys
from pathlib import Path

from lora_lite.cli.opened import on, require_place
from lora_lite.core.errors import listed
from lora_lite.files.checkpoint import Checkpoint
from lora_lite.files.durable import require_free
from lora_lite.files.merge_checkpoint import merge_checkpoint
from lora_lite.files.outline import tables

DESCRIPTION = """\
Write the base model with an adapter merged into its weights: the same shards, index, names and dtypes, and the folder's other files
(config.json, tokenizer). The result is what adapt.merge gives. A part of a layer is merged at a time, in about the memory of the largest
shard.
"""
EXAMPLE = "example:\n  lora-lite merge Llama-3.2-1B adapter.safetensors Llama-3.2-1B-merged"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("base", type=Path, metavar="BASE", help="the base model: a folder with safetensors files, or one such file")
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="a file that ll.save, kohya or diffusers wrote, or a folder of PEFT's"
    )
    parser.add_argument("--prefix", metavar="NAME", help="the part of a pipeline in files of image tools, e.g. lora_te1, unet")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write, or the file where BASE is one; it must not exist yet")


def run(args: argparse.Namespace) -> None:
    """Write the merged model."""
    require_free(args.out)
    adapter = require_place(args.adapter)
    checkpoint = Checkpoint(args.base, functools.partial(tables, [adapter]))
    adapt, params = on(checkpoint, adapter, args.prefix)
    left = merge_checkpoint(checkpoint, adapt, params, args.out, progress=not args.quiet)
    if left and not args.quiet:
        print(f"lora-lite merge: left out {listed(left)}: other forms of the unmerged weights.", file=sys.stderr)
    print(f"{len(adapt.targets)} layers merged into {args.out}")
