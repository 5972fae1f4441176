"""A progress bar for work that takes a while."""

import importlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds of work before the bar appears."""


def shown(items: Iterable[T], what: str, progress: bool) -> Iterator[T]:
    """Yield the items, with a progress bar once they take a while: tqdm's where it is installed, else a line on stderr."""
    if not progress:
        yield from items
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm  # no dependency of ours
    except ImportError:
        start = time.monotonic()
        for k, item in enumerate(items):
            if time.monotonic() - start >= PATIENCE:
                print(f"\r{what}: {k}", end="", file=sys.stderr, flush=True)
            yield item
        if time.monotonic() - start >= PATIENCE:
            print(file=sys.stderr)
    else:
        yield from tqdm(items, desc=what, delay=PATIENCE)
