"""Open an adapter file, of this format or of an image tool: whole, and never unpickled."""

from pathlib import Path

from torch import Tensor

from lora_lite.files.header import FORMAT, VERSION, Header, read_header
from lora_lite.files.safetensors_file import tensors_of, widened


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
    version = metadata.get(VERSION)
    if version != str(FORMAT):
        what = "a safetensors file that ll.save did not write" if version is None else f"format version {version}"
        raise ValueError(
            f'load: expected "{path}" to hold lora_lite format {FORMAT}, found {what}. Load a file written by ll.save. {_PEFTS}'
        )
    return metadata, tensors


def read_of_image_tool(call: str, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of an image tool's file. `call` is the function that reads it.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: where it is damaged, or one that `save` wrote.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{call}: expected a file at "{path}", found none. Pass the path of a safetensors file.')
    metadata, tensors = tensors_of(call, path, "Fetch it again; pickled files are never opened.")
    if VERSION in metadata:
        raise ValueError(
            f'{call}: expected a file of an image tool at "{path}", found one that ll.save wrote. Read it: ll.load(model, "{path}").'
        )
    return metadata, widened(tensors)


_PEFTS = "A folder of PEFT's is read by ll.from_peft, a file of image tools by ll.from_kohya."
