"""A safetensors file as tensors: whole, and never unpickled."""

from pathlib import Path

import safetensors
import torch
from torch import Tensor

_POINTER = b"version https://git-lfs"
"""The beginning of the text that git keeps in the place of a large file."""


def tensors_of(call: str, path: Path, way: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file.

    Args:
        call: the function that reads it, for its error.
        path: the file.
        way: the way out where it is damaged or foreign.

    Raises:
        ValueError: where it is no whole safetensors file; it says what was found.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in list(file.keys())}
    except Exception as e:
        raise damaged(f"{call}: ", path, e, way) from e


def damaged(start: str, path: Path, error: Exception, way: str) -> ValueError:
    """Return the error of a file that safetensors does not read. `start` is the beginning of its text."""
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        return ValueError(
            f'{start}expected "{path}" to be a whole safetensors file, found the pointer of git-lfs to one. Fetch the file itself: '
            "git lfs pull in its folder."
        )
    return ValueError(f'{start}expected "{path}" to be a whole safetensors file, found {_what_is(head)} ({error}). {way}')


def _what_is(head: bytes) -> str:
    if (head[:2] == b"PK" or head[:1] == b"\x80") and head[8:9] != b"{":  # safetensors: eight bytes of length, then JSON
        return "a pickled file"
    return "a truncated or foreign one" if head else "an empty file"


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with those of 8-bit floats as float32: torch stores such numbers and does not add them."""
    narrow = {name for name, t in tensors.items() if t.is_floating_point() and t.itemsize == 1}
    return {name: t.to(torch.float32) if name in narrow else t for name, t in tensors.items()}
