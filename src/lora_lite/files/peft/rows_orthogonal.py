"""Rotations and reflections in PEFT's terms, beside those in `rows.py`."""

from typing import Any

import torch
from torch import Tensor

from lora_lite.core.frozen import Constants
from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.ether import ETHERConfig
from lora_lite.variants.psoft import PSOFTConfig

_SAME = {"dropout": "psoft_dropout", "ab_svd_init": "ab_svd_init", "orth": "psoft_orth", "mag_b": "psoft_mag_b", "mag_a": "psoft_mag_a"}
"""Fields of PSOFT by PEFT's names."""


def _beyond_one_reflection(cfg: ETHERConfig) -> str | None:
    if cfg.n_blocks > 1:
        return f"n_blocks={cfg.n_blocks}: PEFT reflects the whole input"
    return 'side="out": PEFT reflects inputs' if cfg.side == "out" else None


def _one(cfg: Any, constants: Constants) -> float:
    return 1.0


def _free_identity(cfg: PSOFTConfig, constants: Constants) -> Tensor | float:
    A = constants["A"]
    return 0.0 if cfg.orth else torch.eye(len(A), dtype=A.dtype, device=A.device)


def _read_psoft(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {name: resolve(fields, theirs, path) for name, theirs in {"r": "r", **_SAME}.items()}
    if not resolve(fields, "use_cayley_neumann", path):
        return found
    return {
        **{**found, "cayley": "series", "terms": resolve(fields, "num_cayley_neumann_terms", path)},
        **{"eps": resolve(fields, "cayley_neumann_eps", path)},
    }


def _write_psoft(cfg: PSOFTConfig) -> dict[str, Any]:
    written = {theirs: getattr(cfg, name) for name, theirs in {"r": "r", **_SAME}.items()}
    if cfg.cayley == "exact":  # PEFT warns of numbers that it does not use
        return {**written, "use_cayley_neumann": False, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": None}
    return {**written, "use_cayley_neumann": True, "num_cayley_neumann_terms": cfg.terms, "cayley_neumann_eps": cfg.eps}


ROWS: dict[str, Row] = {
    "ether": Row(  # one reflection of the whole input, which PEFT has as an HRA of rank 1
        ETHERConfig,
        "HRA",
        {"u": Leaf("hra_u", 2, shape=(-1, 1))},
        lambda *_: {},
        lambda _: {"r": 1, "apply_GS": False},
        when=lambda _, tensors: tensors["hra_u"].shape[1] == 1,
        completed=lambda _, theirs: {"u": theirs["u"][None]},
        refused=_beyond_one_reflection,
    ),
    "psoft": Row(
        PSOFTConfig,
        "PSOFT",
        {
            "Q": Leaf("psoft_R.weight", (1, 2), _free_identity, hollow=True),
            "b": Leaf("psoft_R.vector_b", 1, _one, optional=True),
            "a": Leaf("psoft_R.vector_a", 1, _one, optional=True),
        },
        _read_psoft,
        _write_psoft,
        refused=lambda cfg: 'svd="auto": the file holds R alone, for the exact SVD and its signs' if cfg.svd == "auto" else None,
    ),
}
