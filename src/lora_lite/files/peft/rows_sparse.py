"""Variants that share or scatter few numbers over the weight, in PEFT's terms."""

from typing import Any

from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.row import Fields, Leaf, Row, Tensors
from lora_lite.variants.c3a import C3AConfig
from lora_lite.variants.fourierft import FourierFTConfig
from lora_lite.variants.miss import MiSSConfig
from lora_lite.variants.shira import SHiRAConfig
from lora_lite.variants.waveft import WaveFTConfig


def _read_miss(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    block, start = tensors["miss_block"], resolve(fields, "init_weights", path)
    found = {"r": block.shape[-1] if start == "bat" else block.shape[0], "start": start if start in ("bat", "mini") else "default"}
    found["mini_r"] = block.shape[1] if start == "mini" else resolve(fields, "mini_r", path)
    return found if start == "bat" else {**found, "dropout": resolve(fields, "miss_dropout", path)}  # PEFT's bat applies none


def _write_miss(cfg: MiSSConfig) -> dict[str, Any]:
    start = True if cfg.start == "default" else cfg.start
    return {"r": cfg.r, "mini_r": cfg.mini_r, "init_weights": start, "miss_dropout": cfg.dropout}


def _placed(fields: Fields, path: str) -> dict[str, Any]:
    return {"scaling": resolve(fields, "scaling", path), "seed": resolve(fields, "random_loc_seed", path)}


ROWS: dict[str, Row] = {
    "miss": Row(
        MiSSConfig,
        "MISS",
        {"D": Leaf("miss_block", (2, 3))},
        _read_miss,
        _write_miss,
        refused=lambda cfg: 'dropout with init="bat": PEFT applies none' if cfg.start == "bat" and cfg.dropout else None,
    ),
    "shira": Row(
        SHiRAConfig,
        "SHIRA",
        {"s": Leaf("shira_weight", 1)},
        lambda fields, path, _: {"r": resolve(fields, "r", path), "seed": resolve(fields, "random_seed", path)},
        lambda cfg: {"r": cfg.r, "random_seed": cfg.seed, "mask_type": "random"},
        constants={"indices": Leaf("shira_indices", 2, floating=False)},
        saved=lambda i, constants: {"indices": constants["indices"]},
    ),
    "c3a": Row(
        C3AConfig,
        "C3A",
        {"w": Leaf("c3a_kernel", 3)},
        lambda fields, path, tensors: {"block_size": tensors["c3a_kernel"].shape[-1]},
        lambda cfg: {"block_size": cfg.block_size, "init_weights": True},
    ),
    "fourierft": Row(
        FourierFTConfig,
        "FOURIERFT",
        {"c": Leaf("fourierft_spectrum", 1)},
        lambda fields, path, tensors: {"n_frequency": len(tensors["fourierft_spectrum"]), **_placed(fields, path)},
        lambda cfg: {"n_frequency": cfg.n_frequency, "scaling": cfg.scaling, "random_loc_seed": cfg.seed, "init_weights": True},
        conv1d=True,
    ),
    "waveft": Row(
        WaveFTConfig,
        "WAVEFT",
        {"c": Leaf("waveft_spectrum", 1)},
        lambda fields, path, tensors: {
            **{"n_frequency": len(tensors["waveft_spectrum"]), "use_idwt": resolve(fields, "use_idwt", path)},
            **_placed(fields, path),
        },
        lambda cfg: {"n_frequency": cfg.n_frequency, "scaling": cfg.scaling, "random_loc_seed": cfg.seed, "use_idwt": cfg.use_idwt},
        conv1d=True,
    ),
}
