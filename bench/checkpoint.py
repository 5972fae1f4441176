"""The state of a training run as one safetensors file: any nesting of dicts and lists of tensors, numbers, strings and None.

Tensors go into the file by number; a skeleton in its header says where each belongs. Nothing is unpickled. The file is written beside its
place and renamed, so that a run that is stopped at any moment leaves a whole one.
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

TENSOR = "tensor"


def save_state(path: Path, state: Any) -> None:
    """Write a state to a file, all or nothing."""
    tensors: dict[str, Tensor] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().contiguous().clone()  # leaves may share storage, which the format refuses
            return {TENSOR: str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {"dict": {k: skeleton(v) for k, v in value.items()}}
        return [skeleton(v) for v in value] if isinstance(value, list | tuple) else value

    beside = path.with_name(f".{path.name}.tmp")
    header = {"state": json.dumps(skeleton(state))}
    try:
        safetensors.torch.save_file(tensors, beside, header)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote; tuples come back as lists."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["state"]  # noqa: SIM118  # no mapping

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[TENSOR]] if TENSOR in value else {k: filled(v) for k, v in value["dict"].items()}
        return [filled(v) for v in value] if isinstance(value, list) else value

    return filled(json.loads(header))
