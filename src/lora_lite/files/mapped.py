"""safetensors files mapped into memory, whose pages can be let go of: a checkpoint of any size takes the memory of what is being read.

`safetensors` maps files too, and keeps each page that was read until the last tensor of the file is gone. So the layout is read here, from
a header that `safetensors` has checked.
"""

import ctypes
import json
import mmap
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from lora_lite.files.safetensors_file import damaged
from lora_lite.layers.identity import block_rows

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""torch's dtypes by safetensors' names."""


class Place(NamedTuple):
    """The place of a tensor: its file, first byte and number of bytes there, and its shape and dtype. None for a dtype that torch lacks."""

    file: Path
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Mapped:
    """The tensors of several safetensors files.

    Args:
        files: the files.

    Raises:
        ValueError: where one is damaged, or two hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.places: dict[str, Place] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in self.files:
            found = places_in(path)
            again = next((name for name in found if name in self.places), None)
            if again is not None:
                raise ValueError(
                    f'"{again}" stands in both "{self.places[again].file.name}" and "{path.name}". Keep one of them in the folder, or add '
                    "the index that says which files belong together."
                )
            self.places |= found

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that lies in the mapped file."""
        file, start, _, shape, dtype = self.places[name]
        if dtype is None:
            raise ValueError(f'"{name}" in "{file}" has a dtype that torch lacks. Update torch, or convert the file first.')
        numel = torch.Size(shape).numel()
        return (
            torch.frombuffer(self._map(file), dtype=dtype, count=numel, offset=start).view(shape)
            if numel
            else torch.empty(shape, dtype=dtype)
        )

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of a buffer that it may not write
        return self._maps[file]

    def release_pages(self) -> None:
        """Let go of the pages that were read. The tensors stay valid and are read again where they are touched."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system takes clean pages back when it needs them
                mapped.madvise(mmap.MADV_DONTNEED)

    def release(self) -> None:
        """Let go of the pages that were read, and of freed memory."""
        self.release_pages()
        if sys.platform == "linux":  # glibc keeps freed blocks of a layer's size between small ones, a layer more at each merge
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


def places_in(path: Path) -> dict[str, Place]:
    """Return the place of each tensor of a safetensors file.

    Raises:
        ValueError: where the file is damaged or of another format.
    """
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass  # checks the header against the file's length
    except Exception as e:
        raise damaged("", path, e, "Fetch it again.") from e
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Mapping[str, Any] = json.loads(file.read(length))
    found = {}
    for name, facts in header.items():
        if name != "__metadata__":
            start, end = facts["data_offsets"]
            found[name] = Place(path, 8 + length + start, end - start, tuple(facts["shape"]), DTYPES.get(facts["dtype"]))
    return found


def overwrite(path: Path, place: Place, where: Any, part: Tensor) -> None:
    """Write a part of a tensor over it in a file, of columns a block of rows at a time.

    Args:
        path: the file, which has the tensor at `place`.
        place: the place.
        where: the index of the part in the tensor, by whole numbers and slices; `...` for all of it.
        part: its values.

    Raises:
        ValueError: where the tensor there is of another dtype or shape.
    """
    room = torch.empty(place.shape, dtype=place.dtype, device="meta")[where]
    if (room.dtype, room.shape) != (part.dtype, part.shape):
        raise ValueError(
            f'expected {room.dtype} of shape {tuple(room.shape)} in "{path}", found {part.dtype} of shape {tuple(part.shape)}.'
        )
    size = part.itemsize
    start = place.start + int(room.storage_offset()) * size
    with path.open("r+b") as file:
        if room.is_contiguous():
            file.seek(start)
            file.write(_bytes(part))
            return
        width = int(room.stride(0))
        count = block_rows(width, part.dtype)
        for k, rows in enumerate(part.split(count)):
            first = start + k * count * width * size
            file.seek(first)
            found = bytearray(((len(rows) - 1) * width + rows.shape[1]) * size)
            file.readinto(found)
            torch.frombuffer(found, dtype=part.dtype).as_strided(rows.shape, (width, 1)).copy_(rows)
            file.seek(first)
            file.write(found)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
