"""An adapter in the form that the user asks for."""

from pathlib import Path

from lora_lite.adapt import Adapt
from lora_lite.core.tree import Tree
from lora_lite.files.adapter_file import write
from lora_lite.files.durable import whole_folder
from lora_lite.files.kohya import to_diffusers, to_kohya
from lora_lite.files.peft import to_peft

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
    """
    if form == "peft":
        with whole_folder(out) as folder:
            to_peft(adapt, params, folder, card=card)
    elif form == "kohya":
        to_kohya(adapt, params, out, prefix="lora_unet" if prefix is None else prefix)
    elif form == "diffusers":
        to_diffusers(adapt, params, out, prefix="unet" if prefix is None else prefix)
    else:
        write(adapt, params, out, weights=based)
