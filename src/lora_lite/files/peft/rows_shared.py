"""Methods whose layers share tensors, in PEFT's terms."""

from typing import Any

from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.randlora import RandLoRAConfig
from lora_lite.variants.vblora import VBLoRAConfig

_OF_RANDLORA = {"randlora_alpha": "alpha", "projection_prng_key": "seed", "randlora_dropout": "dropout"}
_OF_RANDLORA |= {"sparse": "sparse", "very_sparse": "very_sparse"}


def _read_randlora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {ours: resolve(fields, theirs, path) for theirs, ours in _OF_RANDLORA.items()}
    return {"r": tensors["randlora_lambda"].shape[0], **found}


_OF_VBLORA = ("num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")


def _read_vblora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {name: resolve(fields, name, path) for name in _OF_VBLORA}
    return {"r": tensors["vblora_logits_A"].shape[0], "dropout": resolve(fields, "vblora_dropout", path), "start": "random", **found}


ROWS: dict[str, Row] = {
    "randlora": Row(
        RandLoRAConfig,
        "RANDLORA",
        {"Lambda": Leaf("randlora_lambda", 2), "Gamma": Leaf("randlora_gamma", 2)},
        _read_randlora,
        lambda cfg: {"r": cfg.r, **{theirs: getattr(cfg, ours) for theirs, ours in _OF_RANDLORA.items()}},
        shared={"A": "base_model.randlora_A", "B": "base_model.randlora_B"},
        conv1d=True,
    ),
    "vblora": Row(
        VBLoRAConfig,
        "VBLORA",
        {"logits_A": Leaf("vblora_logits_A", 3), "logits_B": Leaf("vblora_logits_B", 3)},
        _read_vblora,
        lambda cfg: {"r": cfg.r, "vblora_dropout": cfg.dropout, **{name: getattr(cfg, name) for name in _OF_VBLORA}},
        shared_leaves={"bank": Leaf("base_model.vblora_vector_bank", 2)},
        conv1d=True,
    ),
}
