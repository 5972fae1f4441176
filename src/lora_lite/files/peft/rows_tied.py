"""Methods whose layers share projections or trained tensors, in PEFT's terms."""

from typing import Any

import torch

from lora_lite.core.frozen import Constants
from lora_lite.files.peft import grouped
from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.layers import transposed
from lora_lite.files.peft.row import Fields, Leaf, Leaves, Row, Tensors
from lora_lite.variants.frod import FRoDConfig, category, directions
from lora_lite.variants.lily import LilyConfig
from lora_lite.variants.pvera import PVeRAConfig
from lora_lite.variants.tinylora import TinyLoRAConfig
from lora_lite.variants.unilora import UniLoRAConfig

_OF_PVERA = {"projection_prng_key": "seed", "d_initial": "d_initial", "pvera_dropout": "dropout"}


def _read_pvera(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {ours: resolve(fields, theirs, path) for theirs, ours in _OF_PVERA.items()}
    return {"r": tensors["pvera_lambda_d"].shape[0] // 2, **found}


_OF_TINYLORA = {"r": "r", "u": "u", "weight_tying": "weight_tying", "projection_seed": "seed"}
_OF_TINYLORA |= {"init_v_bound": "init_v_bound", "tinylora_dropout": "dropout"}

_OF_UNILORA = {"r": "r", "theta_d_length": "theta_d_length", "proj_seed": "seed"}
_OF_UNILORA |= {"init_theta_d_bound": "init_theta_d_bound", "unilora_dropout": "dropout"}
_INDICES = {f"index_{f}": Leaf(f"unilora_indices_{f}", 2, optional=True, floating=False) for f in "AB"}
_SCALES = {f"scale_{f}": Leaf(f"unilora_scales_{f}", 2, optional=True) for f in "AB"}


def _read_unilora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    return {**{ours: resolve(fields, theirs, path) for theirs, ours in _OF_UNILORA.items()}, "start": "random"}


def _saved_unilora(i: int, constants: Constants) -> Leaves:
    return {**{name: constants[name].long() for name in _INDICES}, **{name: constants[name] for name in _SCALES}}


_OF_FROD = {"sparse_rate": "sparse_rate", "regularization_alpha": "regularization_alpha"}
_OF_FROD |= {"projection_prng_key": "seed", "frod_dropout": "dropout"}
_BASES = {
    "V": Leaf("frod_V", 2, optional=True),
    "index": Leaf("frod_s_indices", 2, optional=True, floating=False),
    "size": Leaf("frod_s_size", 1, optional=True, floating=False),  # that of V, which is not kept
}


def _saved_frod(i: int, constants: Constants) -> Leaves:
    return {"V": constants["V"], "index": constants["index"].long(), "size": torch.tensor([i, i])}


_OF_LILY = ("stride_A", "num_B", "scaling")


def _read_lily(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    start = "zero" if resolve(fields, "init_weights", path) else "random"
    found = {"r": tensors["lily_A.weight"].shape[0], "start": start, "groups": grouped.patterns_of(fields.get("target_modules"))}
    return {**found, **{name: resolve(fields, name, path) for name in _OF_LILY}}


def _write_lily(cfg: LilyConfig) -> dict[str, Any]:
    return {"r": cfg.r, "init_weights": cfg.start == "zero", **{name: getattr(cfg, name) for name in _OF_LILY}}


def _experts_apart(cfg: LilyConfig, theirs: Leaves) -> Leaves:
    fits = theirs["B"].shape[0] == cfg.num_B * cfg.r  # else the shape is told with the others
    return {**theirs, "B": theirs["B"].unflatten(0, (cfg.num_B, cfg.r))} if fits else theirs


def _experts_joined(cfg: LilyConfig, leaves: Leaves, constants: Constants) -> tuple[LilyConfig, Leaves]:
    return cfg, {**leaves, "B": leaves["B"].flatten(0, 1)}


ROWS: dict[str, Row] = {
    "pvera": Row(
        PVeRAConfig,
        "PVERA",
        {"lambda_d": Leaf("pvera_lambda_d", 1), "lambda_b": Leaf("pvera_lambda_b", 1)},
        _read_pvera,
        lambda cfg: {"r": cfg.r, **{theirs: getattr(cfg, ours) for theirs, ours in _OF_PVERA.items()}},
        shared={"A": "base_model.pvera_A", "B": "base_model.pvera_B"},
        conv1d=True,
    ),
    "frod": Row(
        FRoDConfig,
        "FROD",
        {
            "lambda_l": Leaf("frod_lambda_l", 1, lambda _, constants: constants["l"]),
            "lambda_s": Leaf("frod_lambda_s_values", 1, hollow=True),
        },
        lambda fields, path, _: {ours: resolve(fields, theirs, path) for theirs, ours in _OF_FROD.items()},
        lambda cfg: {**{theirs: getattr(cfg, ours) for theirs, ours in _OF_FROD.items()}, "sparse_rate": min(cfg.sparse_rate, 1.0)},
        constants=_BASES,
        saved=_saved_frod,
        of_sort=tuple(leaf.key for leaf in _BASES.values()),
        sort=category,
        settled=lambda W, constants: directions(W, constants["V"]),
        conv1d=True,
    ),
    "lily": Row(
        LilyConfig,
        "LILY",
        {name: Leaf(f"lily_{name}.weight", 2) for name in ("A", "B", "router")},
        _read_lily,
        _write_lily,
        refused=lambda cfg: "num_B=1: PEFT's router needs two" if cfg.num_B == 1 else None,
        completed=_experts_apart,
        written=_experts_joined,
        named=lambda cfg, targets, others: grouped.fields_of(cfg.group_of, targets, others),
    ),
    "tinylora": Row(
        TinyLoRAConfig,
        "TINYLORA",
        {},
        lambda fields, path, _: {ours: resolve(fields, theirs, path) for theirs, ours in _OF_TINYLORA.items()},
        lambda cfg: {theirs: getattr(cfg, ours) for theirs, ours in _OF_TINYLORA.items()},
        constants={"A": Leaf("tinylora_A", 2), "B": Leaf("tinylora_B", 2), "P": Leaf("tinylora_P", 3, optional=True)},
        saved=lambda i, constants: {name: constants[name] for name in ("A", "B", "P")},
        shared_leaves={"v": Leaf("base_model.tinylora_v.#", 2)},
        misread=transposed,
        conv1d=True,
    ),
    "unilora": Row(
        UniLoRAConfig,
        "UNILORA",
        {},
        _read_unilora,
        lambda cfg: {theirs: getattr(cfg, ours) for theirs, ours in _OF_UNILORA.items()},
        constants={**_INDICES, **_SCALES},
        saved=_saved_unilora,
        shared_leaves={"theta_d": Leaf("base_model.unilora_theta_d", 1)},
        bare=True,
        conv1d=True,
    ),
}
