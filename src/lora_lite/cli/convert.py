"""Convert an adapter between the forms of lora_lite, PEFT, kohya and diffusers, or to LoRA."""

import argparse
from pathlib import Path

from lora_lite.cli.opened import opened, require_known, require_place
from lora_lite.cli.written import FORMS, require_form, written
from lora_lite.files.card import model_card
from lora_lite.files.durable import require_free
from lora_lite.files.kohya.names import of_image_tools
from lora_lite.transforms.to_lora import to_lora

DESCRIPTION = """\
Convert an adapter: a file that ll.save wrote to a folder of PEFT's, and the reverse. With --r any linear variant is converted to LoRA of
that rank first, the best approximation of its update. The base model is needed where a variant derives tensors from its weights (DoRA,
PiSSA), or a layer is one that the adapter's files do not describe; and to read files of kohya,
LyCORIS and diffusers, whose names it resolves.
"""
EXAMPLE = (
    "examples:\n  lora-lite convert adapter.safetensors peft_folder\n  lora-lite convert dora.safetensors lora_folder --r 16 --base MODEL"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a file that ll.save, kohya or diffusers wrote, or a folder of PEFT's")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file or folder to write; it must not exist yet")
    parser.add_argument("--to", choices=FORMS, help="the form to write, by default the other one of lora_lite and peft")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base model: a folder with safetensors files, or one such file")
    parser.add_argument("--prefix", metavar="NAME", help="the part of a pipeline in files of image tools, e.g. lora_te1, unet")
    parser.add_argument("--card", metavar="NAME", help="write a README.md too, with this name of the base model on the Hub, user/repo")
    parser.add_argument("--r", type=int, metavar="RANK", help="convert to LoRA of this rank")
    parser.add_argument("--alpha", type=float, metavar="ALPHA", help="with --r, the numerator of LoRA's scale, by default the rank")


def run(args: argparse.Namespace) -> None:
    """Write the converted adapter."""
    require_free(args.out)
    if args.alpha is not None and args.r is None:
        raise ValueError("--alpha: expected it with --r, the rank of the LoRA to convert to, found it alone. Add --r, or leave it out.")
    found = opened([args.file], args.base, args.prefix)
    adapt, params = found.adapts[0], found.trees[0]
    place = require_place(args.file)
    own = place.is_file() and not of_image_tools(place)
    form = args.to or ("peft" if own else "lora_lite")
    require_form(form, args.out)
    if args.card is not None and form != "peft":
        raise ValueError(f"--card: expected a folder of PEFT's to put README.md in, found --to {form}. Leave it out, or pass --to peft.")
    require_known(found, also=args.r is not None)
    if args.r is not None:
        adapt, params, errors = to_lora(adapt, params, args.r, args.alpha)
        print(f"LoRA of rank {args.r}: at most {max(errors.values()):.2g} of an update is lost")
    card = None if args.card is None else model_card(adapt, params, base=args.card)
    written(adapt, params, form, args.out, found.based, card, args.prefix)
    print(f"{len(adapt.targets)} layers written to {args.out}")
