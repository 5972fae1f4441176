"""Put a finished file in its place so that a power cut leaves the old one or the new one, whole."""

import os
from collections.abc import Iterable
from pathlib import Path


def replace(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Move files `(from, to)` of one disk to their places, in order. Their bytes reach the disk first, their names before it returns.

    A file system may keep a rename before the bytes that it names: after a power cut the file would be there and empty.
    """
    pairs = list(pairs)
    for beside, _ in pairs:
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
