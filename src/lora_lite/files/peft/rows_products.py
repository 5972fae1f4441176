"""PEFT's rows of updates that are entrywise, Kronecker or blockwise products."""

from typing import Any

from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.loha import LoHaConfig


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value  # PEFT's fields are integers


def _fields(fields: Fields, path: str, *names: str) -> dict[str, Any]:
    return {name: resolve(fields, name, path) for name in names}


def _read_loha(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    return {"r": tensors["hada_w1_b"].shape[0], **_fields(fields, path, "alpha", "rank_dropout", "module_dropout")}


def _write_loha(cfg: LoHaConfig) -> dict[str, Any]:
    return {"r": cfg.r, "alpha": _whole(cfg.alpha), "rank_dropout": cfg.rank_dropout, "module_dropout": cfg.module_dropout}


ROWS_PRODUCTS: dict[str, Row] = {
    "loha": Row(LoHaConfig, "LOHA", {name: Leaf(f"hada_{name}", 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}, _read_loha, _write_loha),
}
