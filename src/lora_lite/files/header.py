"""The header of an adapter file: `save` describes the tensors in it, and `load` checks them against it."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lora_lite.core.certificate import Start
from lora_lite.core.tree import join

FORMAT = 1
VERSION = "lora_lite_format"  # the key of its number
CONSTANT = "constant/"  # before a constant's name in the file; no module path starts so
BASE = "base/"  # before the name of a value that a whole module's displacement stands on

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


class Header(NamedTuple):
    """The description of a file's tensors.

    Attributes:
        configs: the configs, as plain values.
        targets: each target by path.
        shared: the constants that the targets of a variant share.
        shared_params: the params that they share.
        values: of whole modules, the values that the displacements stand on.
        weights: fingerprints of the weights of the other targets.
        starts: how leading singular vectors were found, of the targets whose start is made of them.
        layers: the kind of each linear layer and the shape of its weight, so that the file can be read without the model.
        classes: the classes from outside the package whose variants have the names of shipped ones, by that name.
    """

    configs: list[dict[str, Any]]
    targets: dict[str, Stored]
    shared: dict[str, Described]
    shared_params: dict[str, Described]
    values: dict[str, Described]
    weights: dict[str, str]
    starts: dict[str, Start]
    layers: dict[str, tuple[str, list[int]]]
    classes: dict[str, str]


_LATER = ("shared_params", "values", "weights", "starts", "layers", "classes")
"""Parts that a file has only where they hold something: a file without them is as version 0.1.0 wrote it."""


def write_header(header: Header) -> dict[str, str]:
    """Return the metadata of a safetensors file: strings only."""
    starts = {path: [value if value != math.inf else None for value in start] for path, start in header.starts.items()}  # JSON has no inf
    parts = {**header._asdict(), "targets": {path: asdict(target) for path, target in header.targets.items()}, "starts": starts}
    kept = {key: json.dumps(part) for key, part in parts.items() if part or key not in _LATER}
    return {"format": "pt", VERSION: str(FORMAT), **kept}


def read_header(metadata: Mapping[str, str]) -> Header:
    """Read the metadata that `write_header` returned.

    Raises:
        ValueError: where something is missing or of another kind.
    """
    try:
        configs = [dict(config) for config in json.loads(metadata["configs"])]
        targets = {path: _stored(facts, len(configs)) for path, facts in json.loads(metadata["targets"]).items()}
        shared = {variant: _described(facts) for variant, facts in json.loads(metadata["shared"]).items()}
        later = {key: json.loads(metadata.get(key, "{}")) for key in _LATER}
        shared_params, values = ({path: _described(facts) for path, facts in later[key].items()} for key in ("shared_params", "values"))
        weights = {str(path): str(mark) for path, mark in later["weights"].items()}
        starts = {str(path): _start(*facts) for path, facts in later["starts"].items()}
        layers = _described(later["layers"])
        classes = {str(name): str(cls) for name, cls in later["classes"].items()}
        if not all(isinstance(config["name"], str) for config in configs):
            raise TypeError("a config names no variant")
        if not set(values) <= set(targets):
            raise KeyError("values of a module that is no target")
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e
    return Header(configs, targets, shared, shared_params, values, weights, starts, layers, classes)


def _stored(facts: Mapping[str, Any], configs: int) -> Stored:
    if facts["config"] not in range(configs):
        raise IndexError(f"config {facts['config']} of {configs}")
    params, constants = (_described(facts[key]) for key in ("params", "constants"))
    return Stored(int(facts["config"]), int(facts["i"]), int(facts["o"]), str(facts["role"]), params, constants)


def _start(path: Any, error: Any, angle: Any) -> Start:
    if path not in ("krylov", "exact"):
        raise ValueError(f"a start by {path!r}")
    error, angle = (math.inf if value is None else float(value) for value in (error, angle))
    return Start(path, error, angle)


def _described(facts: Mapping[str, Any]) -> Described:
    return {name: (str(dtype), [int(n) for n in shape]) for name, (dtype, shape) in facts.items()}


def tensor_faults(header: Header, tensors: Mapping[str, Tensor]) -> list[str]:
    """List the departures of a file's tensors from its header."""
    promised = {name: described for path, target in header.targets.items() for name, described in target.tensors(path)}
    for mark, group in ((CONSTANT, header.shared), ("", header.shared_params), (BASE, header.values)):
        promised |= {mark + join(key, name): d for key, described in group.items() for name, d in described.items()}
    unmoved = [join(path, name) for path, names in header.values.items() for name in names if name not in header.targets[path].params]
    faults = [f'missing "{name}"' for name in promised if name not in tensors]
    faults += [f'unexpected "{name}"' for name in tensors if name not in promised]
    faults += [f'"{BASE}{name}": expected a displacement of it, found none' for name in unmoved]
    for name, (dtype, shape) in describe({n: t for n, t in tensors.items() if n in promised}).items():
        if shape != promised[name][1]:
            faults.append(f'"{name}": expected shape {tuple(promised[name][1])}, found {tuple(shape)}')
        if dtype != promised[name][0]:
            faults.append(f'"{name}": expected dtype {promised[name][0]}, found {dtype}')
    return faults
