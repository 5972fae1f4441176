"""PEFT's rows of updates that are entrywise, Kronecker or blockwise products."""

from typing import Any

from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.boft import BOFTConfig
from lora_lite.variants.gralora import GraLoRAConfig
from lora_lite.variants.hira import HiRAConfig
from lora_lite.variants.loha import LoHaConfig
from lora_lite.variants.lokr import LoKrConfig


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value  # PEFT's fields are integers


def _fields(fields: Fields, path: str, *names: str) -> dict[str, Any]:
    return {name: resolve(fields, name, path) for name in names}


def _read_loha(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    return {"r": tensors["hada_w1_b"].shape[0], **_fields(fields, path, "alpha", "rank_dropout", "module_dropout")}


def _write_loha(cfg: LoHaConfig) -> dict[str, Any]:
    return {"r": cfg.r, "alpha": _whole(cfg.alpha), "rank_dropout": cfg.rank_dropout, "module_dropout": cfg.module_dropout}


_LOKR = ("decompose_both", "decompose_factor", "rank_dropout", "module_dropout", "rank_dropout_scale")


def _read_lokr(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    start = "lycoris" if fields.get("init_weights") == "lycoris" else "zeros"
    factors = [tensors[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in tensors]  # none where both are whole matrices
    return {**_fields(fields, path, "r", "alpha", *_LOKR), **({"r": factors[0]} if factors else {}), "start": start}


def _write_lokr(cfg: LoKrConfig) -> dict[str, Any]:
    start = cfg.start if cfg.start == "lycoris" else True
    return {"r": cfg.r, "alpha": _whole(cfg.alpha), **{name: getattr(cfg, name) for name in _LOKR}, "init_weights": start}


def _read_gralora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    k, dropout = resolve(fields, "gralora_k", path), resolve(fields, "gralora_dropout", path)
    return {**_fields(fields, path, "r", "alpha", "hybrid_r"), "k": k, "dropout": dropout}


def _write_gralora(cfg: GraLoRAConfig) -> dict[str, Any]:
    blocks = {"gralora_k": cfg.k, "gralora_dropout": cfg.dropout}
    return {"r": cfg.r, "alpha": _whole(cfg.alpha), "hybrid_r": cfg.hybrid_r, **blocks}


def _read_boft(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    factors, blocks, size = tensors["boft_R"].shape[:3]  # PEFT takes one factor, whatever was asked for, where it cannot compile its kernel
    given = {"block_size": 0, "block_num": blocks} if fields.get("boft_block_num") else {"block_size": size}
    return {**given, "n_butterfly_factor": factors, "block_dropout": resolve(fields, "boft_dropout", path)}


def _write_boft(cfg: BOFTConfig) -> dict[str, Any]:
    blocks = {"boft_block_size": cfg.block_size, "boft_block_num": cfg.block_num}
    return {**blocks, "boft_n_butterfly_factor": cfg.n_butterfly_factor, "boft_dropout": cfg.block_dropout}


ROWS: dict[str, Row] = {
    "loha": Row(LoHaConfig, "LOHA", {n: Leaf(f"hada_{n}", 2) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}, _read_loha, _write_loha),
    "lokr": Row(
        LoKrConfig,
        "LOKR",
        {name: Leaf(f"lokr_{name}", 2, optional=True) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
        _read_lokr,
        _write_lokr,
    ),
    "hira": Row(
        HiRAConfig,
        "HIRA",
        {"A": Leaf("hira_A", 2), "B": Leaf("hira_B", 2)},
        lambda fields, path, tensors: {"r": tensors["hira_A"].shape[0], "dropout": resolve(fields, "hira_dropout", path)},
        lambda cfg: {"r": cfg.r, "hira_dropout": cfg.dropout},
        conv1d=True,
    ),
    "gralora": Row(
        GraLoRAConfig,
        "GRALORA",
        {
            **{"A": Leaf("gralora_A", 3), "B": Leaf("gralora_B", 3)},
            **{name: Leaf(f"gralora_{name}.weight", 2, optional=True) for name in ("A_general", "B_general")},
        },
        _read_gralora,
        _write_gralora,
        conv1d=True,
    ),
    "boft": Row(
        BOFTConfig,
        "BOFT",
        {"Q": Leaf("boft_R", 4), "s": Leaf("boft_s", 2, lambda cfg, constants: 1.0, (-1, 1))},
        _read_boft,
        _write_boft,
    ),
}
