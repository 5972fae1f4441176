"""Adapters by their name on the Hugging Face Hub: fetched by `huggingface_hub`, which keeps them in its cache."""

import os
import re
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def around(place: Path) -> Path | None:
    """Return the folder of an adapter of PEFT's that a file is one of the two of, or None. Its tensors alone do not tell its scale."""
    return place.parent if place.name == CONFIG or (place.name == WEIGHTS and (place.parent / CONFIG).is_file()) else None


def folder_of(place: str | os.PathLike[str], revision: str | None, subfolder: str) -> Path:
    """Return the folder with an adapter's two files: the one at `place` if there is one, else that of a repository of this name.

    A repository's files are all of one commit. Without a network those of the cache are taken.

    Args:
        place: a folder, or the name of a repository, "user/repo".
        revision: a branch, a tag or a commit of the repository; None for its main branch.
        subfolder: of the folder or of the repository; empty for the files at its top.

    Raises:
        NotADirectoryError: where `place` is a file.
        FileNotFoundError: where there is no such folder, nor a repository that can be had.
        ModuleNotFoundError: where a repository is asked for and `huggingface_hub` is not installed.
        ValueError: for a revision of a folder.
    """
    if Path(place).is_file():
        raise NotADirectoryError(
            f'from_peft: expected a folder with {CONFIG} and {WEIGHTS}, found the file "{place}". Pass its folder, '
            f'"{Path(place).parent}". A file that ll.save wrote is read by ll.load, one of image tools by ll.from_kohya.'
        )
    folder = Path(place) / subfolder
    if not isinstance(place, str) or Path(place).exists() or not _NAME.fullmatch(place):
        if revision is not None:
            raise ValueError(
                f'from_peft: expected revision with the name of a repository on the Hub, e.g. "user/repo", found '
                f'revision="{revision}" with "{place}". Leave it out for a folder.'
            )
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise ModuleNotFoundError(
            f'from_peft: expected a folder at "{place}", found none. To read a repository of that name on the Hub, '
            "install its client: pip install huggingface_hub."
        ) from e
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in (CONFIG, WEIGHTS)]
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=wanted)) / subfolder
    except Exception as e:  # of a dozen classes, for a wrong name, no network, no right to read it
        at = "" if revision is None else f' at revision "{revision}"'
        raise FileNotFoundError(
            f'from_peft: expected a folder at "{place}", or a repository of that name on the Hub{at}, found neither ({e}). Correct the '
            "name, log in where the repository is private, or fetch its files first and pass their folder."
        ) from e
