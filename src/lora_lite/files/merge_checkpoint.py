"""Merge an adapter into a checkpoint on the disk: files are copied, and merged tensors written into the copies, part by part."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.progress import shown
from lora_lite.core.tree import AnyTree
from lora_lite.derived.merge import merged_parts, refuse_unmergeable
from lora_lite.files.checkpoint import Checkpoint
from lora_lite.files.durable import replace as put
from lora_lite.files.durable import require_free, whole_folder
from lora_lite.files.mapped import overwrite

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
"""Endings of files that hold weights."""


def merge_checkpoint(checkpoint: Checkpoint, adapt: Adapt, params: AnyTree, out: Path, progress: bool = True) -> list[str]:
    """Write the merged model beside the base, with the same names, shards and dtypes, equal to what `adapt.merge` returns.

    Args:
        checkpoint: the base model.
        adapt: an adapter over `checkpoint.model`.
        params: its params.
        out: a folder to make, which gets the base's other files too; or a file, where the base is one.
        progress: show a progress bar on stderr when it takes more than a second.

    Returns:
        The names of the base's files that were left out: other forms of its weights, which no adapter was merged into.

    Raises:
        ValueError: where a target cannot be merged; nothing is written then.
        FileExistsError: where there is something at `out`.
        FileNotFoundError: where its folder does not exist.
    """
    adapt._require(params, "merge")
    refuse_unmergeable(adapt._plan)
    require_free(out)
    with whole_folder(out) if not checkpoint.is_file else _beside(out) as folder:
        copies = {path: folder / (out.name if checkpoint.is_file else path.name) for path in checkpoint.mapped.files}
        left = [] if checkpoint.is_file else _copy_others(checkpoint.folder, folder, {path.name for path in checkpoint.mapped.files})
        for path, copy in copies.items():
            shutil.copyfile(path, copy)
        for target, cfg in shown(adapt._plan.entries, "merge", progress):
            _merge_into(copies, checkpoint, merged_parts(adapt._plan, target, cfg, params, checkpoint.mapped.release_pages))
    return left


def _merge_into(copies: Mapping[Path, Path], checkpoint: Checkpoint, parts: Iterator[tuple[str, Any, Tensor, Tensor]]) -> None:
    """Write the merged tensors of one target over its own in the copies of the files."""
    for path, where, part, kept in parts:
        if path not in checkpoint.names:
            raise ValueError(
                f'merge: expected a tensor "{path}" in the files of "{checkpoint.place}", found none. Load the model and call adapt.merge.'
            )
        for name in checkpoint.names[path]:
            place = checkpoint.mapped.places[name]
            overwrite(copies[place.file], place, where, part.to(kept.dtype))
        del part
        checkpoint.mapped.release()


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """Yield a folder in which a file of the same name is made, which is put in its place when the block ends well."""
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent) as folder:
        yield Path(folder)
        put([(Path(folder) / place.name, place)])


def _copy_others(folder: Path, to: Path, model: set[str]) -> list[str]:
    """Copy all files but those of weights, and return the names of these less the model's own."""
    left = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix in WEIGHTS or path.name.endswith(".bin.index.json"):
            left += [] if str(name) in model else [str(name)]
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
    return left
