"""Files under names that a model has no more, or not here: brought to this model's by transformers' own tables.

transformers renames modules between its versions (LLaVA's `language_model.model.` is `model.language_model.` now) and fuses experts that
were layers of their own. It keeps tables by which it reads older checkpoints, and the same tables read older adapters. An adapter of a
bare backbone fits the model with a head, and the reverse, by the prefix that such models name.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.errors import listed, several
from lora_lite.core.tree import join
from lora_lite.files.peft import gates
from lora_lite.files.peft.fields import carried, resolve
from lora_lite.files.peft.layers import A, B
from lora_lite.layers.experts import has_experts
from lora_lite.layers.find import find
from lora_lite.layers.kind import Kind

Fields = dict[str, Any]
Places = dict[tuple[str, str], Tensor]
"""Tensors by the path of their module and the rest of their key."""
Parts = dict[tuple[int, int], str]
"""Paths of layers of single experts, by their place beside one another in a parameter and by their expert."""
_WRAPPERS = r"(?:(?:base_layer|token_adapter|ln_tuning_layers)\.)*"


class Named(NamedTuple):
    """A file's fields and tensors in the model's names, and what could not be brought to them."""

    fields: Fields
    tensors: dict[str, Tensor]
    faults: list[str]


def in_names_of(
    model: nn.Module,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prefix: str,
    keys: Sequence[str],
    kinds: Sequence[type[Kind]],
) -> Named:
    """Rename modules that the model lacks, by a table of transformers or the prefix of the model's backbone, and warn of it.

    Args:
        model: the model.
        fields: those of the file's config.
        tensors: those of the file.
        prefix: of their keys.
        keys: the ends of the keys that a layer's tensors may have.
        kinds: as in `from_peft`.
    """
    ending = re.compile(rf"(?:(.*?)\.)?({_WRAPPERS}(?:{'|'.join(map(re.escape, keys)) or '(?!)'}|[^.]+))")
    cut = {name: ending.fullmatch(name.removeprefix(prefix)) for name in tensors if name.startswith(prefix)}
    places: Places = {(found[1] or "", found[2]): tensors[name] for name, found in cut.items() if found}
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    lost = dict.fromkeys(path for path, _ in places if path not in known)
    table = Table.of(model) if lost else Table([], {})
    moved = {old: new for old in lost if (new := _found(model, table.renamed(old), old, known)) is not None}
    times = Counter([*moved.values(), *{path for path, _ in places}])
    moved = {old: new for old, new in moved.items() if times[new] == 1}  # else two modules of the file would be one of the model
    fields, faults = dict(fields), list[str]()
    for old, new in moved.items():
        _carry(model, fields, old, new)
    places = {(moved.get(path, path), leaf): tensor for (path, leaf), tensor in places.items()}
    if fields["peft_type"] == "LORA" and not fields.get("use_dora"):
        for (fused, rows), parts in table.experts([path for path in lost if path not in moved]).items():
            fault = _fuse(model, fields, places, fused, rows, parts)
            faults += [fault] if fault else []
            moved |= {} if fault else dict.fromkeys(parts.values(), fused)
        for path in _routers(model, fields, places, kinds):
            moved[path] = join(path, "weight")
            _carry(model, fields, path, moved[path])
            places |= {(moved[path], leaf): places.pop((path, leaf)) for leaf in (A, B)}
    if moved:
        pairs = [f'"{old}" as "{new}"' for old, new in moved.items()]
        warnings.warn(f"from_peft: the file names modules otherwise than this model. It was read with\n{several(pairs)}", stacklevel=4)
    rest = {name: tensor for name, tensor in tensors.items() if cut.get(name) is None}
    return Named(fields, {**rest, **{prefix + join(path, leaf): t for (path, leaf), t in places.items()}}, faults)


def lost(model: Any, paths: Iterable[str]) -> dict[str, str]:
    """Return the layers that PEFT loses as it loads a file of LoRA, with the names that it looks for.

    It brings each name to the present one by transformers' tables, as if it were of an older model. Where a table changes a name that the
    model has, PEFT finds no layer of the new one. A prefix alone that is cut off is put back.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers before version 5, by which PEFT renames nothing
        return {}
    if get_checkpoint_conversion_mapping(getattr(getattr(model, "config", None), "model_type", None)) is None:
        return {}
    table = Table.of(model)
    now = {path: table.renamed(path, A) for path in paths}
    return {path: new for path, new in now.items() if not f".{path}".endswith(f".{new}")}


def _found(model: Any, renamed: str, old: str, known: set[str]) -> str | None:
    """Return the path among `known` that a renamed or old one is, with or without the prefix of the model's backbone."""
    start = getattr(model, "base_model_prefix", "") or ""
    ways = [renamed] + [way for path in (renamed, old) for way in (path.removeprefix(f"{start}."), join(start, path)) if start]
    return next((path for path in ways if path in known and path != old), None)


def _carry(model: nn.Module, fields: Fields, old: str, new: str) -> None:
    """Let the fields that name the module `old` name `new` too, in place."""
    fields |= gates.carried(carried(fields, old, new), old, new)
    whole, tokens, parameters = (fields.get(name) for name in ("modules_to_save", "trainable_token_indices", "target_parameters"))
    if whole and any(old.endswith(name) for name in whole):
        fields["modules_to_save"] = [*whole, new]
    ids = next((ids for name, ids in tokens.items() if old.endswith(name)), None) if isinstance(tokens, Mapping) else None
    if ids is not None:
        fields["trainable_token_indices"] = {**tokens, new: ids}  # type: ignore[dict-item]
    own = dict(model.named_modules()).get(new, nn.Module())._parameters
    asked = [join(new, p) for p in own if any(f".{join(old, p)}".endswith(f".{name}") for name in parameters or ())]
    fields |= {"target_parameters": [*parameters, *asked]} if asked and parameters else {}


class Table(NamedTuple):
    """transformers' renamings for a model, and the experts that it fuses."""

    transforms: list[Any]
    attribute: Mapping[str, str]
    """The older form of the renamings: regular expressions and what takes their place, of which the first that matches holds."""

    @classmethod
    def of(cls, model: Any) -> "Table":
        """Read the tables of a model's classes. A model of another library has none."""
        attribute = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        if not hasattr(model, "base_model_prefix"):
            return cls([], attribute)
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # transformers before version 5, whose models have the attribute
            return cls([], attribute)
        return cls(get_model_conversion_mapping(model), attribute)

    def renamed(self, path: str, leaf: str = "weight") -> str:
        """Return the path of a module by the tables, which are of its parameters."""
        name = f"{path}.{leaf}"
        for pattern, new in self.attribute.items():
            name, times = re.subn(pattern, new, name)
            if times:
                break
        for transform in self.transforms:
            if not hasattr(transform, "operations"):
                name, _ = transform.rename_source_key(name)
        return name.removesuffix(f".{leaf}")

    def experts(self, paths: Sequence[str]) -> dict[tuple[str, int], Parts]:
        """Return the layers of single experts by the parameter that they are parts of, and how many it lays side by side of each expert."""
        found: dict[tuple[str, int], Parts] = {}
        for path in paths:
            name = f"{self.renamed(path)}.weight"
            for place, rows, pattern, target in self._fusions():
                match = re.fullmatch(rf"(.*){pattern}", name)
                if match:
                    found.setdefault((match[1] + target, rows), {})[place, int(match[2])] = path
                    break
        return found

    def _fusions(self) -> Iterator[tuple[int, int, str, str]]:
        """Yield `(place, places, expression of a layer's weight, parameter)` of the conversions that stack experts."""
        for transform in self.transforms:
            steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(transform, "operations", ())]
            if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) and len(transform.target_patterns) == 1:
                for place, source in enumerate(transform.source_patterns):
                    yield place, len(transform.source_patterns), re.escape(source).replace(r"\*", r"(\d+)"), transform.target_patterns[0]


def _fuse(model: nn.Module, fields: Fields, places: Places, fused: str, rows: int, parts: Parts) -> str | None:
    """Make the factors of single experts those of the parameter that holds all of them, in place. Return a fault where that is not defined.

    Matrices side by side, `W = [W1; W3]`, have the update `[s B1 A1; s B3 A3] = s blockdiag(B1, B3) [A1; A3]`, of the sum of their ranks.
    """
    parent, _, name = fused.rpartition(".")
    weight = dict(model.named_modules()).get(parent, nn.Module())._parameters.get(name)
    if weight is None or weight.dim() != 3:
        return f'"{next(iter(parts.values()))}": expected the parameter "{fused}" of all experts, found none'
    experts = len(weight)
    every = [(place, n) for place in range(rows) for n in range(experts)]
    lacking = [
        f"{place}.{n}" for place, n in every if (place, n) not in parts or any((parts[place, n], leaf) not in places for leaf in (A, B))
    ]
    if lacking or len(parts) > len(every):
        return (
            f'"{fused}": expected the factors of {rows} x {experts} layers of single experts, found {len(parts)}; lacking {listed(lacking)}'
        )
    agree = {(resolve(fields, "lora_alpha", path), tuple(places[path, A].shape), tuple(places[path, B].shape)) for path in parts.values()}
    if len(agree) > 1:
        return f'"{fused}": expected layers of single experts that agree in alpha and shapes, found {listed(sorted(map(str, agree)))}'
    alpha, (r, _), _ = next(iter(agree))
    factors = {place: (places.pop((path, A)), places.pop((path, B))) for place, path in parts.items()}
    places[fused, A] = torch.stack([torch.cat([factors[place, n][0] for place in range(rows)]) for n in range(experts)])
    places[fused, B] = torch.stack([torch.block_diag(*(factors[place, n][1] for place in range(rows))) for n in range(experts)])
    scale = math.sqrt(rows) if resolve(fields, "use_rslora", fused) else rows  # PEFT multiplies by `rows` in both cases
    for field, value in {"rank_pattern": rows * r, "alpha_pattern": alpha * scale}.items():
        fields[field] = {re.escape(fused): value, **(fields.get(field) or {})}
    return None


def _routers(model: nn.Module, fields: Fields, places: Places, kinds: Sequence[type[Kind]]) -> list[str]:
    """List the routers beside experts that have factors: linear layers once, and modules with a matrix now."""
    linear, modules = find(model, "linear", kinds), dict(model.named_modules())
    asked = fields.get("target_parameters") or ()
    found = [path for path, leaf in places if leaf == A and (path, B) in places and path not in linear and join(path, "weight") in linear]
    found = [path for path in found if any(map(has_experts, modules[path.rpartition(".")[0]].children()))]
    return [path for path in found if not any(f".{join(path, 'weight')}".endswith(f".{name}") for name in asked)]
