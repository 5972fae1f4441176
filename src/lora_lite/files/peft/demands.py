"""Demands on the fields of `adapter_config.json`: what asks for more than is computed here is refused by name."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import listed, several
from lora_lite.files.peft.fields import ANY, DEFAULTS, FREE, OFF, PATTERNS, resolve, version_of
from lora_lite.layers.kind import Kind

ONLY: dict[str, dict[str, Any]] = {"PSOFT": {"psoft_svd": "full"}}
"""The fields that may have one value that is not off, of each PEFT type."""

STARTS = (True, False, "gaussian", "orthogonal", "eva", "pissa", "olora", "mica")
"""The values of `init_lora_weights` whose files are understood."""

_CONVERT = "Convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...) writes a plain LoRA."
_SHIFTED = {
    "corda": "the start that it shifts the base by is not in the file, nor can it be derived from the weight alone",
    "lora_ga": "the start that it shifts the base by is not in the file, nor can it be derived from the weight alone",
    "pissa_niter": "the start is of a randomised SVD, which cannot be repeated to the bit",
}


def check_fields(fields: Mapping[str, Any], where: object) -> None:
    """Refuse an unknown method, and every field that changes the mathematics in a way that is not supported.

    Raises:
        ValueError: it names each field.
    """
    method = fields.get("peft_type")
    if method is None:
        raise ValueError(
            f'from_peft: expected peft_type, the name of a method of PEFT\'s, in "{where}", found none. Convert the files of another '
            "library by its own tools, or merge them into the model there, as mlx_lm.fuse does."
        )
    if not isinstance(method, str) or method not in DEFAULTS:
        raise ValueError(
            f'from_peft: expected peft_type in "{where}" to be one of {listed(DEFAULTS)}, found "{method}". '
            "Merge the adapter with PEFT's merge_and_unload and adapt the merged model. Prompts and routers cannot be merged: run them by "
            "PEFT."
        )
    known, only = ANY | FREE[method] | set(DEFAULTS[method]), ONLY.get(method, {})
    others = {name: value for name, value in fields.items() if name not in known and _is_on(name, value) and value != only.get(name)}
    faults = [f"{name}: expected {repr(only[name]) if name in only else 'it off'}, found {value!r}" for name, value in others.items()]
    if faults:
        raise ValueError(
            f'from_peft: expected "{where}" to ask only for what lora_lite computes too, found:\n{several(faults)}\n'
            "Merge the adapter with PEFT's merge_and_unload and adapt the merged model, or train it with these off."
        )
    _check_values(fields, where)
    _check_scale(fields, where)
    if method == "LORA":
        _check_start(fields, where)
        if fields.get("bias") not in (*OFF, "all", "lora_only"):
            raise ValueError(
                f'from_peft: expected bias in "{where}" to be one of "none", "all", "lora_only", found {fields["bias"]!r}. '
                "Merge the adapter with PEFT's merge_and_unload and adapt the merged model."
            )
    if method == "OFT" and resolve(fields, "use_cayley_neumann", ""):
        _check_series(fields, where)
    wavelet = resolve(fields, "wavelet_family", "")
    if method == "WAVEFT" and resolve(fields, "use_idwt", "") and wavelet != "db1":
        raise ValueError(
            f"from_peft: expected wavelet_family in \"{where}\" to be 'db1', whose inverse transform is known in closed form, found "
            f"{wavelet!r}, whose filters are not here. Merge the adapter with PEFT's merge_and_unload and adapt the merged model."
        )


def _is_on(name: str, value: Any) -> bool:
    """Whether a field asks for something. An empty pattern asks for nothing, an empty config for PEFT's defaults, as `kasa_config: {}`."""
    return value not in OFF or (value == {} and not name.endswith("_pattern"))


_NAMES_TOO = ("init_lora_weights", "init_weights")
"""The fields that are True or False, or the name of a start."""


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) and not isinstance(number, bool) for number in value)


def _number_blocks(value: Any) -> bool:
    return _are_ids(value) or _are_ids([value])


def _name_modules(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_tokens(value: Any) -> bool:
    return _are_ids(value) or (isinstance(value, Mapping) and all(map(_are_ids, value.values())))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_number, value.values()))


_STRUCTURED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": (lambda value: isinstance(value, str), "a text"),
    "target_modules": (_name_modules, "names or an expression"),
    "exclude_modules": (_name_modules, "names or an expression"),
    "layers_to_transform": (_number_blocks, "a number or a list of numbers"),
    "layers_pattern": (_name_modules, "names"),
    "modules_to_save": (_are_names, "a list of names"),
    "target_parameters": (_are_names, "a list of names"),
    "feedforward_modules": (_name_modules, "names or an expression"),
    "alora_invocation_tokens": (_are_ids, "a list of ids"),
    "token_indices": (_are_tokens, "a list of ids, or one by name"),
    "trainable_token_indices": (_are_tokens, "a list of ids, or one by name"),
    "kasa_config": (_are_numbers, "numbers by name"),
}
"""The fields that are no single number, with what they hold unless they are null."""


def _misfit(name: str, value: Any, default: Any) -> str | None:
    """Return the expectation that a value does not meet by the type of its default, or None."""
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool) or (value is None and not default), "true or false"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), "a text"
    else:
        fits, wanted = _is_number(value) or (value is None and default is None), "a number"
    return None if fits else f"{name}: expected {wanted}, found {value!r}"


def _check_values(fields: Mapping[str, Any], where: object) -> None:
    """Refuse values of another type than PEFT's, and patterns that are no expressions. Errors far off, or defaults, would follow."""
    method, faults = fields["peft_type"], list[str]()
    plain = {name: default for name, default in DEFAULTS[method].items() if name not in (*_NAMES_TOO, *_STRUCTURED)}
    faults += [fault for name, default in plain.items() if name in fields and (fault := _misfit(name, fields[name], default))]
    for name, (fits, wanted) in _STRUCTURED.items():
        value = fields.get(name)
        faults += [] if value is None or fits(value) else [f"{name}: expected {wanted}, found {value!r}"]
    for name in PATTERNS.get(method, {}).values():
        patterns = fields.get(name) or {}
        if not isinstance(patterns, Mapping):
            faults.append(f"{name}: expected numbers by expression, found {patterns!r}")
            continue
        faults += [f"{name}: expected a number at {key!r}, found {value!r}" for key, value in patterns.items() if not _is_number(value)]
        faults += [f"{name}: expected regular expressions, found {key!r}: {why}" for key in patterns if (why := _unread(key))]
    if faults:
        raise ValueError(
            f'from_peft: expected "{where}" to hold values as PEFT writes them, found:\n{several(faults)}\n'
            "Correct them in the file, or save the adapter again."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unread(pattern: str) -> str | None:
    """Return why a text is no regular expression, or None."""
    try:
        re.compile(pattern)
    except re.error as e:
        return str(e)
    return None


def _check_scale(fields: Mapping[str, Any], where: object) -> None:
    """Refuse a negative scale where its sign cannot be moved to a factor: a start would be taken off with the other sign."""
    start, method = resolve(fields, "init_lora_weights", ""), fields["peft_type"]
    if method == "LORA" and start not in ("pissa", "olora") and not _is_on("kasa_config", fields.get("kasa_config")):
        return
    for name in ("lora_alpha", "alpha", "randlora_alpha"):
        values = [fields.get(name), *(fields.get("alpha_pattern") or {}).values()]
        negative = next((value for value in values if isinstance(value, int | float) and value < 0), None)
        if negative is not None:
            raise ValueError(
                f'from_peft: expected {name} in "{where}" to be >= 0, found {negative}. '
                "Merge the adapter with PEFT's merge_and_unload and adapt the merged model."
            )


def _check_start(fields: Mapping[str, Any], where: object) -> None:
    start = resolve(fields, "init_lora_weights", "")
    if not any(start is s or (isinstance(s, str) and start == s) for s in STARTS):
        why = next((reason for name, reason in _SHIFTED.items() if str(start).startswith(name)), None)
        fix = _CONVERT if why else "Merge the adapter with PEFT's merge_and_unload and adapt the merged model."
        raise ValueError(
            f'from_peft: expected init_lora_weights in "{where}" to be one of {", ".join(map(repr, STARTS))}, found {start!r}'
            f"{f': {why}' if why else ''}. {fix}"
        )
    _check_alone(fields, start, where)
    if start not in ("pissa", "olora"):
        return
    if fields.get("use_dora"):
        raise ValueError(f'from_peft: expected use_dora in "{where}" off with init_lora_weights="{start}", found True. {_CONVERT}')
    if fields.get("lora_dropout"):
        raise ValueError(
            f'from_peft: expected lora_dropout in "{where}" to be 0 with init_lora_weights="{start}", which has no dropout here, found '
            f"{fields['lora_dropout']}. Set it to 0 in the file: outputs in evaluation mode do not depend on it."
        )


def _check_alone(fields: Mapping[str, Any], start: Any, where: object) -> None:
    """Refuse an invocation, or KaSA, beside another form of LoRA."""
    beside = [name for name in ("use_dora", "lora_bias") if fields.get(name)] + ([start] if start in ("pissa", "olora", "mica") else [])
    for name in ("alora_invocation_tokens", "kasa_config"):
        others = [*beside, *(other for other in ("alora_invocation_tokens",) if other != name and fields.get(other))]
        others += ["lora_dropout"] if name == "kasa_config" and fields.get("lora_dropout") else []  # which has none here
        if _is_on(name, fields.get(name)) and others:
            raise ValueError(
                f'from_peft: expected {name} in "{where}" beside a plain LoRA, found {listed(others)}. Merge the adapter with PEFT\'s '
                "merge_and_unload and adapt the merged model."
            )


def _check_series(fields: Mapping[str, Any], where: object) -> None:
    if version_of(fields) < (0, 18):
        raise ValueError(
            f'from_peft: expected peft_version in "{where}" to be 0.18 or newer with use_cayley_neumann, whose series was another before, '
            f"found {fields.get('peft_version') or 'none'}. Merge the adapter with the PEFT that trained it and adapt the merged model."
        )


def unable(kind: type[Kind], cfg: AdapterConfig) -> str | None:
    """Return the reason why a variant that PEFT has at such a layer cannot be had here, or None."""
    if set(cfg.uses) <= set(kind.gives):
        if cfg._drops and "dropout" not in kind.gives:
            return f"no dropout at such a layer here ({kind.why}): set it to 0 in the file, outputs in evaluation mode do not depend on it"
        return None
    return f"not at such a layer here ({kind.why or 'it gives less'}): merge it in PEFT, merge_and_unload(), and adapt the merged model"
