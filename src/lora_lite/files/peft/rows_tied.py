"""Methods whose layers share projections or trained tensors, in PEFT's terms."""

from typing import Any

from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.pvera import PVeRAConfig

_OF_PVERA = {"projection_prng_key": "seed", "d_initial": "d_initial", "pvera_dropout": "dropout"}


def _read_pvera(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {ours: resolve(fields, theirs, path) for theirs, ours in _OF_PVERA.items()}
    return {"r": tensors["pvera_lambda_d"].shape[0] // 2, **found}


ROWS_TIED: dict[str, Row] = {
    "pvera": Row(
        PVeRAConfig,
        "PVERA",
        {"lambda_d": Leaf("pvera_lambda_d", 1), "lambda_b": Leaf("pvera_lambda_b", 1)},
        _read_pvera,
        lambda cfg: {"r": cfg.r, **{theirs: getattr(cfg, ours) for theirs, ours in _OF_PVERA.items()}},
        shared={"A": "base_model.pvera_A", "B": "base_model.pvera_B"},
        conv1d=True,
    ),
}
