"""`adapter_config.json`: an adapter in the fields of PEFT's config."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_lite.adapt import Adapt
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, several
from lora_lite.core.plan import Target
from lora_lite.files.peft import tokens, whole
from lora_lite.files.peft.diverted import diverted
from lora_lite.files.peft.fields import BY_PATH, PATTERNS
from lora_lite.files.peft.layers import EXPERTS_SINCE, axes_of, is_conv1d, is_parameter
from lora_lite.files.peft.row import Leaves, Row
from lora_lite.files.peft.targeted import expression, listed_or_expressed
from lora_lite.files.peft.tasks import task_of
from lora_lite.variants.ln_tuning import LNTuningConfig
from lora_lite.variants.tokens import TokensConfig

Pairs = list[tuple[Target, AdapterConfig]]

VERSION = "0.18.0"
"""The oldest PEFT that reads these files as they are meant: OFT's series was another before. Of stacks of matrices it is a later one."""

OF_TYPE: dict[str, dict[str, Any]] = {
    "LORA": {"bias": "none"},
    "IA3": {"feedforward_modules": []},
    "DELORA": {"bias": "none"},
    "HRA": {"bias": "none"},
    "BEFT": {},
    "ROAD": {},
    "OFT": {"bias": "none"},
    "PSOFT": {},
    "VERA": {"bias": "none", "save_projection": True},
    "PVERA": {"bias": "none", "save_projection": True},
    "RANDLORA": {"bias": "none", "save_projection": True},
    "VBLORA": {"bias": "none", "save_only_topk_weights": False},
    "TINYLORA": {"bias": "none", "save_projection": True},
    "UNILORA": {"bias": "none", "save_indices": True},
    "FROD": {"bias": "none", "save_projection": True},
    "ADALORA": {"bias": "none"},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"bias": "none"},
    "SHIRA": {},
    "HIRA": {},
    "GRALORA": {"bias": "none"},
    "BOFT": {"bias": "none"},
    "C3A": {"bias": "none"},
    "FOURIERFT": {"bias": "none"},
    "WAVEFT": {"bias": "none", "wavelet_family": "db1"},
    "TRAINABLE_TOKENS": {},
    "DEFT": {"bias": "none", "init_weights": True},
    "PEANUT": {},
    "OSF": {},
    "ADAMSS": {"init_weights": "orthogonal"},
    "GLORA": {"bias": "none"},
    "LILY": {},
    "SUPERTUNING": {"save_precomputed_indices": True},
}
"""Fields that are the same in every file of a PEFT type."""


class Written(NamedTuple):
    """A layer in PEFT's terms."""

    target: Target
    row: Row
    fields: dict[str, Any]
    tensors: Leaves


def fields_of(
    adapt: Adapt, layers: list[Written], as_whole: Pairs, of_tokens: Mapping[str, TokensConfig], complete: bool = True
) -> dict[str, Any]:
    """Return the fields of PEFT's config: common values, and patterns where layers may differ.

    Args:
        adapt: the adapted model.
        layers: those of a method.
        as_whole: the modules trained as a whole.
        of_tokens: the tables whose rows are trained, by path.
        complete: whether `adapt` has all modules of the base model. Else a name in a list might be the end of another module's name, and an
            expression stands in its place.

    Raises:
        ValueError: where layers differ in a field that PEFT has once.
    """
    norms = [target.path for target, cfg in as_whole if isinstance(cfg, LNTuningConfig)]
    modules = [target.path for target, cfg in as_whole if not isinstance(cfg, LNTuningConfig)]
    method = layers[0].row.peft_type if layers else whole.LN_TUNING if norms else tokens.TRAINABLE_TOKENS
    task = adapt._plan.task_type or task_of(adapt._plan.base, [*(layer.target.path for layer in layers), *norms], modules)
    fields = {"peft_type": method, "peft_version": VERSION, "task_type": task, "inference_mode": True, **OF_TYPE[method]}
    fields["base_model_name_or_path"] = getattr(getattr(adapt._plan.base, "config", None), "_name_or_path", None)
    fields |= {"modules_to_save": modules} if modules else {}
    chosen = [layer.target.path for layer in layers] or norms or list(of_tokens)
    of_path = {t.path: t for t in adapt.targets}
    weights = diverted(adapt._plan.base, [layer.target for layer in layers], method)
    parameters = [path for path in chosen if is_parameter(of_path[path])]
    modules_asked = [path for path in chosen if path not in parameters and path not in weights]
    besides = [path for path, _ in adapt._plan.base.named_modules() if path not in set(chosen)] if complete else None
    fields["target_modules"] = listed_or_expressed(modules_asked, besides)
    if layers:
        cfg = next(cfg for target, cfg in zip(adapt.targets, adapt.configs) if target.path == chosen[0])
        fields |= layers[0].row.named(cfg, [layer.target for layer in layers], besides)
    fields |= {"target_parameters": [*parameters, *weights.values()]} if parameters or weights else {}
    if any(axes_of(adapt._plan.base, path) for path in parameters):
        fields["peft_version"] = ".".join(map(str, EXPERTS_SINCE))
    fields |= tokens.fields_of(adapt._plan.base, of_tokens, alone=not layers) if of_tokens else {}
    if not layers:
        return fields
    return {**fields, **_of_layers(layers, method, weights)}


def _of_layers(layers: list[Written], method: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of the variant: what most layers have, and patterns for the others. `weights` are named as `diverted` has it.

    Raises:
        ValueError: where layers differ in a field that PEFT has once.
    """
    fields: dict[str, Any] = {}
    if any(layer.row.conv1d for layer in layers):
        fields["fan_in_fan_out"] = any(is_conv1d(layer.target) for layer in layers)
    for lists in {layer.row.lists for layer in layers if layer.row.lists}:
        fields[lists] = expression([layer.target.path for layer in layers if layer.row.lists == lists])
    agreed = layers[0].row.agreed([(layer.target, layer.fields) for layer in layers])
    of_layers = {layer.target.path: {**layer.fields, **agreed} for layer in layers}
    patterns, faults = PATTERNS.get(method, {}), []
    for name in dict.fromkeys(name for own in of_layers.values() for name in own):
        values = {path: own.get(name) for path, own in of_layers.items()}
        fields[name] = Counter(values.values()).most_common(1)[0][0]
        others = {path: value for path, value in values.items() if value != fields[name]}
        if name in patterns:
            exactly = {path if method in BY_PATH else f"^{re.escape(weights.get(path, path))}$": value for path, value in others.items()}
            fields[patterns[name]] = exactly
            faults += _taken(name, values, others) if method in BY_PATH else []
        elif others:
            faults.append(f"{name}: {fields[name]!r} and {next(iter(others.values()))!r} at {listed(others)}")
    if faults:
        raise ValueError(
            f"to_peft: expected configs that agree in what PEFT has once for all layers, found:\n{several(faults)}\n"
            "Keep the adapter with ll.save, or convert it with ll.to_lora first."
        )
    return fields


def _taken(name: str, values: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """List the layers whose path ends in that of an exception, and which PEFT would give its value."""
    ends = [(path, end) for path in values for end in others if re.match(rf".*\.{end}$", path) and values[path] != others[end]]
    return [f'{name}: {others[end]!r} at "{end}", which PEFT takes for "{path}" too' for path, end in ends]
