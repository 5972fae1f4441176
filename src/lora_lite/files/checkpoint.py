"""A base model as a checkpoint on the disk: its files, and a model of its modules whose weights lie in the mapped files.

The modules are those of transformers where `config.json` names one of its models. Elsewhere they follow from the names and shapes of the
tensors. The model is never called, and no more of it is read than what is asked of it.
"""

import importlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite.core.errors import listed
from lora_lite.core.tree import join
from lora_lite.files.inferred import inferred
from lora_lite.files.mapped import Mapped
from lora_lite.files.peft.names import Table

CONFIG = "config.json"


class Checkpoint:
    """A base model on the disk.

    `model` has its modules, `names` the names in the files of each parameter, and `lacking` the paths of the modules left out,
    for which the files have no tensors: transformers makes some modules of several tensors. `known` is whether transformers built it.

    Args:
        place: a folder with safetensors files and, of a transformers model, its `config.json`; or one safetensors file.
        tables: reads from the adapters at which paths they adapt an embedding, which the shape of a weight does not show.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where a file is damaged or lacking, the weights are packed, or transformers does not know the model.
    """

    def __init__(self, place: Path, tables: Callable[[], Collection[str]] = tuple) -> None:
        if not place.exists():
            raise FileNotFoundError(
                f'expected the base model at "{place}", found nothing. Pass a folder with safetensors files, or one such file.'
            )
        self.place, self.is_file = place, place.is_file()
        self.folder = place.parent if self.is_file else place
        self.mapped = Mapped([place] if self.is_file else weight_files(place))
        fields = {} if self.is_file else _fields(place / CONFIG)
        if fields.get("quantization_config"):
            raise ValueError(
                f'expected plain weights in "{place}", found packed ones (quantization_config in {CONFIG}). Pass the model from before '
                "quantisation, or load the packed one and call adapt.merge, which makes dense weights of it."
            )
        self.known = bool(fields.get("model_type"))
        self.model = _of_transformers(place, fields) if self.known else inferred(self.mapped, tables())
        self.names = _assigned(self.model, self.mapped)
        self.lacking = _without_weights_removed(self.model)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a folder's model: those of its index, or else the one of the usual name, or else all.

    Raises:
        FileNotFoundError: where there are none, or one of the index is lacking.
        ValueError: where the index is damaged or there are several.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f'expected one index in "{folder}", found {listed([p.name for p in indices])}. Pass a folder with one model.')
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f'expected "{indices[0]}" to be an index of shards, found a damaged one ({e!r}). Fetch it again.') from e
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            raise FileNotFoundError(f'expected the shards that "{indices[0]}" names, found no {listed(lost)}. Fetch them first.')
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    usual = [path for path in files if path.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
    if not files:
        raise FileNotFoundError(
            f'expected safetensors files in "{folder}", found none. Save the model with save_pretrained; pickled files are never opened.'
        )
    return usual[:1] or files


def _fields(place: Path) -> dict[str, Any]:
    if not place.is_file():
        return {}
    try:
        return dict(json.loads(place.read_text("utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f'expected "{place}" to be a JSON object, found a damaged one ({e}). Fetch it again.') from e


def _of_transformers(folder: Path, fields: Mapping[str, Any]) -> nn.Module:
    """Build the modules of a transformers model, without weights."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as e:
        raise ModuleNotFoundError(
            f'expected transformers, whose model "{folder}" is ({CONFIG}: model_type "{fields["model_type"]}"), found it not installed. '
            "Install it: pip install transformers."
        ) from e
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = next((c for name in fields.get("architectures") or () if (c := getattr(transformers, name, None))), None)
        with torch.device("meta"):
            model: nn.Module = cls(config) if cls is not None else transformers.AutoModel.from_config(config)
    except Exception as e:  # of many classes, for a model that it does not know
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(
            f'expected a model that this transformers knows in "{folder}", found model_type "{fields["model_type"]}" ({reason}). '
            "Update it, or load the model yourself and call adapt.merge."
        ) from e
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def _assigned(model: nn.Module, mapped: Mapped) -> dict[str, list[str]]:
    """Make the files' tensors the parameters of the model, and return the names in the files of each parameter, by its path.

    A name of the model's own goes before one that transformers has renamed since, and may stand with or without the backbone's prefix."""
    start = getattr(model, "base_model_prefix", "") or ""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    shapes = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(id(p), []).append((join(path, name), module, name))
                shapes[id(p)] = tuple(p.shape)
    names: dict[str, list[str]] = {}
    ways = {
        key: [way for path, _, _ in held for way in (path, *((path.removeprefix(f"{start}."), join(start, path)) if start else ()))]
        for key, held in places.items()
    }
    older = _older(model, set(mapped.places) - {way for own in ways.values() for way in own})
    for key, held in places.items():
        once = dict.fromkeys(ways[key])
        for candidates in ([*once], [name for way in once for name in older.get(way, [])]):
            found = [name for name in candidates if name in mapped.places and mapped.places[name].shape == shapes[key]]
            if found:
                break
        else:
            continue
        p = nn.Parameter(mapped.tensor(found[0]), requires_grad=False)
        for path, module, name in held:
            module._parameters[name] = p
            names[path] = found
    return names


def _older(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Sort names of tensors that the model has no more by those that they have now, by transformers' tables."""
    table, found = Table.of(model), dict[str, list[str]]()
    for name in names:
        path, _, leaf = name.rpartition(".")
        found.setdefault(join(table.renamed(path, leaf), leaf), []).append(name)
    return found


def _without_weights_removed(model: nn.Module) -> list[str]:
    """Remove modules with parameters that the files lack, so that nothing takes them for adaptable, and return their paths."""
    found = [path for path, module in model.named_modules() if any(p is not None and p.is_meta for p in module._parameters.values())]
    for path in found:
        parent, _, name = path.rpartition(".")
        if path and any(path.startswith(f"{other}.") for other in found):
            continue  # gone with the one above
        if path:
            model.get_submodule(parent)._modules.pop(name)
        else:
            model._parameters.clear()
    return found
