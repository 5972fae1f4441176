"""An adapter in the form that the user asks for."""

from pathlib import Path

from lora_lite.adapt import Adapt
from lora_lite.cli.opened import require_base
from lora_lite.core.tree import Tree
from lora_lite.files.adapter_file import write
from lora_lite.files.card import write_card
from lora_lite.files.durable import whole_folder
from lora_lite.files.kohya import to_diffusers, to_kohya
from lora_lite.files.peft.without_base import of_base
from lora_lite.files.peft.write import write_files

FORMS = ("lora_lite", "peft", "kohya", "diffusers")


def require_form(form: str, out: Path) -> None:
    """Raise where the path to write shows that another form is meant."""
    if form == "peft" and out.suffix == ".safetensors":
        raise ValueError(f'expected a folder to write PEFT\'s two files to, found "{out}". Name a folder, or pass --to lora_lite.')
    if form != "peft" and out.is_dir():
        raise ValueError(f'expected a file to write, found the folder "{out}". Name a file in it.')


def written(adapt: Adapt, params: Tree, form: str, out: Path, based: bool, card: str | None = None, prefix: str | None = None) -> None:
    """Write an adapter whole or not at all.

    Args:
        adapt: the adapted model.
        params: its params.
        form: one of `FORMS`.
        out: the file or folder, free yet.
        based: whether the model has the base model's weights.
        card: the text of a README beside PEFT's files, or None.
        prefix: the name of the part of a pipeline in files of image tools; None for that of a U-Net.

    Raises:
        ValueError: where the form cannot hold the adapter, or not without the base model.
    """
    if form == "peft":
        require_base({} if based else of_base(adapt, params))
        with whole_folder(out) as folder:
            write_files(adapt, params, folder, complete=based)
            if card is not None:
                write_card(card, folder)
    elif form == "kohya":
        to_kohya(adapt, params, out, prefix="lora_unet" if prefix is None else prefix)
    elif form == "diffusers":
        to_diffusers(adapt, params, out, prefix="unet" if prefix is None else prefix)
    else:
        write(adapt, params, out, weights=based)
