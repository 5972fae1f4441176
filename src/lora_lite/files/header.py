"""The header of an adapter file: `save` describes the tensors in it, and `load` checks them against it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lora_lite.core.tree import join

FORMAT = 1
CONSTANT = "constant/"  # before a constant's name in the file; no module path starts so

Described = dict[str, tuple[str, list[int]]]  # name -> dtype and shape


@dataclass(frozen=True)
class Stored:
    """A target in a file: its config, the layer's widths and role, the dtype and shape of each tensor."""

    config: int
    i: int
    o: int
    role: str
    params: Described
    constants: Described

    def tensors(self, path: str) -> Iterator[tuple[str, tuple[str, list[int]]]]:
        """Return the names of the target's tensors in the file."""
        for name, described in self.params.items():
            yield join(path, name), described
        for name, described in self.constants.items():
            yield CONSTANT + join(path, name), described


def describe(tensors: Mapping[str, Tensor]) -> Described:
    """Return the dtype and shape of each tensor as plain values."""
    return {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}


def write_header(
    configs: list[dict[str, Any]], targets: Mapping[str, Stored], shared: Mapping[str, Described], shared_params: Mapping[str, Described]
) -> dict[str, str]:
    """Return the metadata of a safetensors file: strings only."""
    parts = {"configs": configs, "targets": {path: asdict(target) for path, target in targets.items()}, "shared": shared}
    parts |= {"shared_params": shared_params} if shared_params else {}  # a file without any is as version 0.1.0 wrote it
    return {"format": "pt", "lora_lite_format": str(FORMAT), **{key: json.dumps(part) for key, part in parts.items()}}


def read_header(metadata: Mapping[str, str]) -> tuple[list[dict[str, Any]], dict[str, Stored], dict[str, Described], dict[str, Described]]:
    """Read the metadata that `write_header` returned.

    Raises:
        ValueError: where something is missing or of another kind.
    """
    try:
        configs = [dict(config) for config in json.loads(metadata["configs"])]
        targets = {path: _stored(facts, len(configs)) for path, facts in json.loads(metadata["targets"]).items()}
        shared = {variant: _described(facts) for variant, facts in json.loads(metadata["shared"]).items()}
        shared_params = {variant: _described(facts) for variant, facts in json.loads(metadata.get("shared_params", "{}")).items()}
        if not all(isinstance(config["name"], str) for config in configs):
            raise TypeError("a config names no variant")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e
    return configs, targets, shared, shared_params


def _stored(facts: Mapping[str, Any], configs: int) -> Stored:
    if facts["config"] not in range(configs):
        raise IndexError(f"config {facts['config']} of {configs}")
    params, constants = (_described(facts[key]) for key in ("params", "constants"))
    return Stored(int(facts["config"]), int(facts["i"]), int(facts["o"]), str(facts["role"]), params, constants)


def _described(facts: Mapping[str, Any]) -> Described:
    return {name: (str(dtype), [int(n) for n in shape]) for name, (dtype, shape) in facts.items()}


def tensor_faults(
    targets: Mapping[str, Stored], shared: Mapping[str, Described], shared_params: Mapping[str, Described], tensors: Mapping[str, Tensor]
) -> list[str]:
    """List the departures of a file's tensors from its header."""
    promised = {name: described for path, target in targets.items() for name, described in target.tensors(path)}
    promised |= {CONSTANT + join(variant, name): d for variant, described in shared.items() for name, d in described.items()}
    promised |= {join(variant, name): d for variant, described in shared_params.items() for name, d in described.items()}
    faults = [f'missing "{name}"' for name in promised if name not in tensors]
    faults += [f'unexpected "{name}"' for name in tensors if name not in promised]
    for name, (dtype, shape) in describe({n: t for n, t in tensors.items() if n in promised}).items():
        if shape != promised[name][1]:
            faults.append(f'"{name}": expected shape {tuple(promised[name][1])}, found {tuple(shape)}')
        if dtype != promised[name][0]:
            faults.append(f'"{name}": expected dtype {promised[name][0]}, found {dtype}')
    return faults
