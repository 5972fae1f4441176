"""Put a finished file in its place so that a power cut leaves the old one or the new one, whole."""

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


def replace(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Move files `(from, to)` of one disk to their places, in order. Their bytes reach the disk first, their names before it returns.

    A file system may keep a rename before the bytes that it names: after a power cut the file would be there and empty. Each file gets the
    permissions that `open(place, "w")` would leave it.
    """
    pairs = list(pairs)
    for beside, place in pairs:
        if (mode := _mode(place)) != _mode(beside):  # safetensors writes for the owner alone
            os.chmod(beside, mode)
        sync(beside)
    for folder in dict.fromkeys(beside.parent for beside, _ in pairs):
        sync(folder)
    for beside, place in pairs:
        os.replace(beside, place)
    for folder in dict.fromkeys(place.parent for _, place in pairs):
        sync(folder)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk; only POSIX systems open folders."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_file(call: str, place: Path) -> None:
    """Refuse a path that no file can be written to.

    Raises:
        FileNotFoundError: where its directory does not exist.
        IsADirectoryError: where it is a directory.
    """
    if not place.parent.is_dir():
        raise FileNotFoundError(f'{call}: expected the directory of "{place}" to exist, found none. Create it first.')
    if place.is_dir():
        raise IsADirectoryError(f'{call}: expected the path of a file, found the directory "{place}". Name a file in it.')


@contextmanager
def written(place: Path) -> Iterator[Path]:
    """Yield a path beside `place`. What the block writes there takes that name when it ends well, and is gone when it does not."""
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield beside
        replace([(beside, place)])
    finally:
        beside.unlink(missing_ok=True)


def store(tensors: Mapping[str, Tensor], beside: Path, place: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file at `beside`, which is to take the name `place`. The same tensors and metadata are the same bytes.

    Raises:
        OSError: where the disk does not take it, which safetensors reports by an error of its own.
    """
    try:
        safetensors.torch.save_file(dict(tensors), beside, dict(metadata))
    except safetensors.SafetensorError as e:
        raise OSError(f'expected "{place}" to be written, found that it could not be ({e}). Check its rights and the free space.') from e
    _order(beside, metadata)


def _order(path: Path, metadata: Mapping[str, str]) -> None:
    """Write the metadata of a safetensors file over itself in its own order: safetensors takes that of a hash table, another each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = {**json.loads(file.read(length)), "__metadata__": dict(metadata)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder beside `place`, which takes that name when the block ends well, with all that it holds on the disk.

    After an error there is no trace of it.

    Raises:
        FileExistsError: where there is something at `place` already, other than an empty folder.
        FileNotFoundError: where its parent does not exist.
    """
    require_free(place)
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir()
    try:
        yield beside
        for path in [*beside.rglob("*"), beside]:
            sync(path)
        if place.is_dir():
            place.rmdir()  # empty: not every system renames over a folder
        os.rename(beside, place)
        sync(place.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_free(place: Path) -> None:
    """Raise unless a new file or folder can be written at a place."""
    if not place.parent.is_dir():
        raise FileNotFoundError(f'expected the folder of "{place}" to exist, found none. Create it first.')
    if place.is_file() or (place.is_dir() and any(place.iterdir())) or place.is_symlink():
        raise FileExistsError(f'expected nothing at "{place}", which is to be written, found something. Name another place, or remove it.')


def _mode(place: Path) -> int:
    """Return the permissions of a file; where there is none, those of a new one. Reading the umask would set it for other threads."""
    try:
        return stat.S_IMODE(place.stat().st_mode)
    except FileNotFoundError:
        new = place.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        new.touch()
        return stat.S_IMODE(new.stat().st_mode)
    finally:
        new.unlink(missing_ok=True)
