"""Methods whose layers share tensors, in PEFT's terms."""

from typing import Any

from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.randlora import RandLoRAConfig

_OF_RANDLORA = {"randlora_alpha": "alpha", "projection_prng_key": "seed", "randlora_dropout": "dropout"}
_OF_RANDLORA |= {"sparse": "sparse", "very_sparse": "very_sparse"}


def _read_randlora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {ours: resolve(fields, theirs, path) for theirs, ours in _OF_RANDLORA.items()}
    return {"r": tensors["randlora_lambda"].shape[0], **found}


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
}
