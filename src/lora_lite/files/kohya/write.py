"""`to_kohya` and `to_diffusers`: an adapter and its params as one file of an image tool."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.alike import made_alike
from lora_lite.core.config import AdapterConfig
from lora_lite.core.errors import require_type, several
from lora_lite.core.plan import Target
from lora_lite.files.durable import require_file, store, written
from lora_lite.files.kohya.methods import ALPHA, DOWN, METHODS, UP
from lora_lite.files.peft.layers import kernel_of
from lora_lite.layers.find import find

AnyParams = Mapping[str, Mapping[str, Tensor]]
Layers = dict[str, dict[str, Tensor]]


@made_alike
def to_kohya(adapt: Adapt, params: AnyParams, path: str | os.PathLike[str], *, prefix: str = "lora_unet") -> None:
    """Write LoRA, LoHa or LoKr as a file of kohya's or LyCORIS'.

    Args:
        adapt: the adapted model of the params, one part of a pipeline.
        params: a tree that fits it.
        path: the file to write; its directory must exist.
        prefix: the part's name in the file, such as `"lora_unet"` or `"lora_te1"`. Image tools know the layers of a `CLIPTextModel` under
            `text_model`, which transformers has dropped: `"lora_te1_text_model"` there.

    Raises:
        TypeError: where an argument is of another type, as in another order.
        ValueError: where `params` does not fit, these files cannot hold a variant or a layer, or two layers would have one name.
        FileNotFoundError: where the directory does not exist.
    """
    layers = _layers("to_kohya", adapt, params, path, prefix)
    flat: dict[str, list[str]] = {}
    for layer in find(adapt._plan.base, "linear", adapt._plan.kinds):
        flat.setdefault(layer.replace(".", "_"), []).append(layer)
    faults = [f'"{p}": named as {others} with underscores for dots' for p in layers if len(others := flat[p.replace(".", "_")]) > 1]
    _refuse("to_kohya", faults)
    named = {f"{prefix}_{p.replace('.', '_')}": own for p, own in layers.items()}
    _save({f"{name}.{key}": t for name, own in named.items() for key, t in own.items()}, Path(path))


@made_alike
def to_diffusers(adapt: Adapt, params: AnyParams, path: str | os.PathLike[str], *, prefix: str = "unet") -> None:
    """Write LoRA as a file that diffusers' `load_lora_weights` reads.

    Such a file means a scale of 1. So `B` is written times the scale, which is exact where that is a power of two.

    Args:
        adapt: the adapted model of the params, one part of a pipeline.
        params: a tree that fits it.
        path: the file to write, such as `pytorch_lora_weights.safetensors`; its directory must exist.
        prefix: the part's name in the file, such as `"unet"`, `"transformer"` or `"text_encoder"`.

    Raises:
        TypeError: where an argument is of another type, as in another order.
        ValueError: where `params` does not fit, or these files cannot hold a variant or a layer.
        FileNotFoundError: where the directory does not exist.
    """
    layers = _layers("to_diffusers", adapt, params, path, prefix, ("lora",))
    tensors = {}
    for at, own in layers.items():
        scale = float(own[ALPHA]) / len(own[DOWN])
        tensors[f"{prefix}.{at}.lora_A.weight"] = own[DOWN]
        tensors[f"{prefix}.{at}.lora_B.weight"] = (scale * own[UP].double()).to(own[UP].dtype)
    _save(tensors, Path(path))


def _layers(call: str, adapt: Any, params: Any, path: Any, prefix: Any, names: tuple[str, ...] = tuple(METHODS)) -> Layers:
    """Return the tensors of each target, or raise for those that these files cannot hold."""
    usage = f"{call}(adapt, params, path)"
    require_type(isinstance(adapt, Adapt), usage, "adapt", "what build or load returned", adapt)
    require_type(isinstance(params, Mapping), usage, "params", "a params tree, e.g. adapt.init()", params)
    require_type(isinstance(path, str | os.PathLike), usage, "path", "the path of a file", path)
    if not isinstance(prefix, str) or not re.fullmatch(r"\w+", prefix):
        raise ValueError(f'{call}: expected prefix as the name of a part of a pipeline, e.g. "lora_unet" or "unet", found {prefix!r}.')
    adapt._require(params, call)
    adapt._require_stored(params, call)
    require_file(call, Path(path))
    layers, faults = Layers(), []
    for target, cfg in adapt._plan.entries:
        try:
            layers[target.path] = _tensors(adapt, target, cfg, params[target.path], names)
        except ValueError as e:
            faults.append(f'"{target.path}": {type(cfg).__name__}: {e}')
    _refuse(call, faults)
    return layers


def _tensors(adapt: Adapt, target: Target, cfg: AdapterConfig, leaves: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    method = METHODS.get(cfg.name) if cfg.name in names else None
    if method is None or type(cfg) is not method.config:
        raise ValueError(f"these files hold {', '.join(names)}")
    kernel = kernel_of(adapt._plan.base, target) if target.path else None
    if kernel is None:
        raise ValueError("these files hold nn.Linear and convolutions inside a model, transposed ones not")
    own = method.write(cfg, {name: t.detach().cpu() for name, t in leaves.items()}, kernel)
    return {key: t.contiguous().clone() for key, t in own.items()}


def _refuse(call: str, faults: list[str]) -> None:
    if faults:
        raise ValueError(
            f"{call}: expected an adapter that such a file can hold, found:\n{several(faults)}\n"
            "Convert linear variants with ll.to_lora first, or keep the adapter with ll.save."
        )


def _save(tensors: Mapping[str, Tensor], place: Path) -> None:
    with written(place) as beside:
        store(tensors, beside, place, {"format": "pt"})
