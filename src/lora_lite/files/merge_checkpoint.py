"""Merge an adapter into a checkpoint on the disk, a layer at a time: files are copied, and merged tensors written into the copies."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapt import Adapt
from lora_lite.core.progress import shown
from lora_lite.core.tree import AnyTree
from lora_lite.derived.merge import merge, refuse_unmergeable
from lora_lite.files.checkpoint import Checkpoint
from lora_lite.files.durable import replace as put
from lora_lite.files.durable import require_free, whole_folder

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
        for name, tensor in _merged(checkpoint, adapt, params, progress):
            place = checkpoint.mapped.places[name]
            if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
                raise ValueError(
                    f'merge: expected "{name}" as {place.dtype} of shape {place.shape}, found {tensor.dtype}, {tuple(tensor.shape)}.'
                )
            with copies[place.file].open("r+b") as file:
                file.seek(place.start)
                data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                file.write(data)
    return left


def _merged(checkpoint: Checkpoint, adapt: Adapt, params: AnyTree, progress: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged tensors under their names in the files."""
    plan = adapt._plan
    for target, cfg in shown(plan.entries, "merge", progress):
        with _in_memory(plan.base.get_submodule(target.kind.host(target.path))):
            checkpoint.mapped.release()
            merged = merge(replace(plan, entries=((target, cfg),)), params)
        for path, tensor in merged.items():
            if path not in checkpoint.names:
                raise ValueError(
                    f'merge: expected a tensor "{path}" in the files of "{checkpoint.place}", found none. Load the model and call '
                    "adapt.merge."
                )
            yield from ((name, tensor) for name in checkpoint.names[path])
        del merged
        checkpoint.mapped.release()


@contextmanager
def _in_memory(module: nn.Module) -> Iterator[None]:
    """Read a module's parameters into memory: tensors in a mapped file are not aligned, and sums over them would round otherwise."""
    mapped = dict(module._parameters)
    try:
        for name, p in mapped.items():
            module._parameters[name] = None if p is None else nn.Parameter(p.detach().clone(), requires_grad=False)
        yield
    finally:
        module._parameters.update(mapped)


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
