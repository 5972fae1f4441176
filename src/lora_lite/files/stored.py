"""Open an adapter file: whole, of this format, and never unpickled."""

from pathlib import Path

from torch import Tensor

from lora_lite.files.header import FORMAT, Header, read_header
from lora_lite.files.safetensors_file import tensors_of


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read the header and the tensors of a file that `save` wrote.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where it is damaged, foreign or of another format version.
    """
    metadata, tensors = _read(path)
    try:
        return read_header(metadata), tensors
    except ValueError as e:
        raise ValueError(
            f'load: expected "{path}" to describe its configs and targets, found a damaged header ({e}). Save it again.'
        ) from e


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        found = "a directory" if path.is_dir() else "none"
        raise FileNotFoundError(f'load: expected a file at "{path}", found {found}. Pass the path that was given to save. {_PEFTS}')
    metadata, tensors = tensors_of("load", path, "Save it again with ll.save; pickled files are never opened.")
    version = metadata.get("lora_lite_format")
    if version != str(FORMAT):
        what = "a safetensors file that ll.save did not write" if version is None else f"format version {version}"
        raise ValueError(
            f'load: expected "{path}" to hold lora_lite format {FORMAT}, found {what}. Load a file written by ll.save. {_PEFTS}'
        )
    return metadata, tensors


_PEFTS = "A folder of PEFT's is read by ll.from_peft."
