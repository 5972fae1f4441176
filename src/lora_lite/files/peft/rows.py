"""Each variant in PEFT's terms, one row a variant: names of its tensors, neutral values, fields of its config.

Of each trained tensor `theirs = origin + ours`, where the origin is PEFT's neutral value: 0, 1, a row norm, PiSSA's start.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lora_lite.core.frozen import Constants
from lora_lite.core.plan import Target
from lora_lite.files.peft import rows_lora, rows_newer, rows_orthogonal, rows_products, rows_shared, rows_sparse, rows_tied
from lora_lite.files.peft.fields import resolve
from lora_lite.files.peft.gates import FEEDFORWARD, GATE, is_of_inputs
from lora_lite.files.peft.row import Fields, Leaf, Leaves, Row, Tensors
from lora_lite.variants.adalora import AdaLoRAConfig
from lora_lite.variants.bitfit import BitFitConfig
from lora_lite.variants.delora import DeLoRAConfig
from lora_lite.variants.hra import HRAConfig
from lora_lite.variants.ia3 import IA3Config
from lora_lite.variants.ia3_ff import IA3FFConfig
from lora_lite.variants.oft import OFTConfig
from lora_lite.variants.road import ROADConfig
from lora_lite.variants.vera import VeRAConfig


def _read_delora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    strength, dropout = resolve(fields, "delora_lambda", path), resolve(fields, "module_dropout", path)
    return {"r": tensors["delora_A"].shape[0], "lambda0": strength, "dropout": dropout}


def _delora_norms(i: int, constants: Constants) -> Leaves:
    return {"w": constants.get("w", torch.ones(1)).expand(i)}  # PEFT has one norm for each input


def _read_oft(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    size = (1 + math.isqrt(1 + 8 * tensors["oft_R.weight"].shape[1])) // 2  # PEFT rounds oft_block_size to a divisor in silence
    series = resolve(fields, "use_cayley_neumann", path)
    found = {"block_size": size, "block_share": resolve(fields, "block_share", path), "cayley": "series" if series else "exact"}
    return {**found, "terms": resolve(fields, "num_cayley_neumann_terms", path)} if series else found


def _write_oft(cfg: OFTConfig) -> dict[str, Any]:
    series = {"use_cayley_neumann": cfg.cayley == "series", "num_cayley_neumann_terms": cfg.terms}
    return {"r": 0, "oft_block_size": cfg.block_size, "block_share": cfg.block_share, **series}


def _agreed_oft(layers: Sequence[tuple[Target, Fields]]) -> dict[str, Any]:
    """Return the number of blocks where it is that of all layers, or a width of which PEFT takes the nearest divisor to be theirs."""
    sizes = [(target.i, fields["oft_block_size"]) for target, fields in layers]
    if len({size for _, size in sizes}) == 1:
        return {}
    if len(counts := {i // size for i, size in sizes}) == 1:
        return {"r": counts.pop(), "oft_block_size": 0}
    least, most = min(size for _, size in sizes), max(size for _, size in sizes)
    fitting = [wanted for wanted in range(least, most + 1) if all(_nearest_divisor(i, wanted) == size for i, size in sizes)]
    return {"oft_block_size": fitting[0]} if fitting else {}


def _nearest_divisor(i: int, size: int) -> int:
    """Return the divisor of `i` that is nearest to `size`, the lower of two, as PEFT rounds."""
    return min((k for k in range(1, i + 1) if i % k == 0), key=lambda k: (abs(k - size), k))


_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")


def _read_adalora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    schedule = {name: resolve(fields, name, path) for name in _SCHEDULE}
    alpha = resolve(fields, "lora_alpha", path) or schedule["init_r"]  # as PEFT does: 0 is not off
    return {**schedule, "alpha": alpha, "dropout": resolve(fields, "lora_dropout", path)}


def _unlike_adalora(cfg: AdaLoRAConfig) -> str | None:
    if cfg.total_step is None:
        return "total_step=None: PEFT requires a number"
    return "alpha=0: PEFT takes init_r in its place" if cfg.alpha == 0 else None


def _write_adalora(cfg: AdaLoRAConfig) -> dict[str, Any]:
    return {**{name: getattr(cfg, name) for name in _SCHEDULE}, "lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout}


def _pruned(cfg: AdaLoRAConfig, theirs: Leaves) -> Leaves:
    """Fill in zeros for the triplets that PEFT cuts out of its files, those with `E = 0`."""
    missing = cfg.init_r - theirs["E"].shape[0]
    if missing <= 0:
        return theirs
    pads = {"A": (0, 0, 0, missing), "B": (0, missing), "E": (0, missing)}
    return {name: F.pad(t, pads[name]) for name, t in theirs.items()}


def _one(cfg: Any, constants: Constants) -> float:
    return 1.0


ROWS: dict[str, Row] = {
    **rows_orthogonal.ROWS,
    **rows_lora.ROWS,
    **rows_products.ROWS,
    **rows_sparse.ROWS,
    **rows_tied.ROWS,
    **rows_shared.ROWS,
    **rows_newer.ROWS,
    "ia3_ff": Row(
        IA3FFConfig,
        "IA3",
        {"g": Leaf(GATE, (1, 2), _one, (1, -1))},
        lambda *_: {},
        lambda _: {},
        when=lambda _, tensors: is_of_inputs(tensors[GATE]),
        lists=FEEDFORWARD,
        conv1d=True,
    ),
    "ia3": Row(IA3Config, "IA3", {"g": Leaf(GATE, (1, 2), _one, (-1, 1))}, lambda *_: {}, lambda _: {}, conv1d=True),
    "delora": Row(
        DeLoRAConfig,
        "DELORA",
        {"A": Leaf("delora_A", 2), "B": Leaf("delora_B", 2), "l": Leaf("delora_lambda", 1, lambda cfg, _: cfg.lambda0)},
        _read_delora,
        lambda cfg: {"r": cfg.r, "delora_lambda": cfg.lambda0, "module_dropout": cfg.dropout},
        constants={"w": Leaf("delora_w_norm", 1)},
        saved=_delora_norms,
        refused=lambda cfg: 'start="copy": PEFT has no frozen copy to take off' if cfg.start == "copy" else None,
    ),
    "bitfit": Row(BitFitConfig, "BEFT", {"db": Leaf("beft_bias", 2, shape=(1, -1))}, lambda *_: {}, lambda _: {}),
    "hra": Row(
        HRAConfig,
        "HRA",
        {"U": Leaf("hra_u", 2)},
        lambda fields, path, tensors: {"r": tensors["hra_u"].shape[1]},
        lambda cfg: {"r": cfg.r, "apply_GS": False},
        refused=lambda cfg: 'side="out": PEFT reflects inputs' if cfg.side == "out" else None,
    ),
    "road": Row(
        ROADConfig,
        "ROAD",
        {"theta": Leaf("road_theta", 1), "a": Leaf("road_alpha", 1, _one)},
        lambda fields, path, _: {name: resolve(fields, name, path) for name in ("variant", "group_size")},
        lambda cfg: {"variant": cfg.variant, "group_size": cfg.group_size},
    ),
    "vera": Row(
        VeRAConfig,
        "VERA",
        {"lambda_d": Leaf("vera_lambda_d", 1), "lambda_b": Leaf("vera_lambda_b", 1)},
        lambda fields, path, tensors: {
            **{"r": tensors["vera_lambda_d"].shape[0], "seed": resolve(fields, "projection_prng_key", path)},
            **{"d_initial": resolve(fields, "d_initial", path), "dropout": resolve(fields, "vera_dropout", path)},
        },
        lambda cfg: {"r": cfg.r, "projection_prng_key": cfg.seed, "d_initial": cfg.d_initial, "vera_dropout": cfg.dropout},
        shared={"A": "base_model.vera_A", "B": "base_model.vera_B"},
        conv1d=True,
    ),
    "adalora": Row(
        AdaLoRAConfig,
        "ADALORA",
        {"A": Leaf("lora_A", 2), "B": Leaf("lora_B", 2), "E": Leaf("lora_E", 2, shape=(-1, 1))},
        _read_adalora,
        _write_adalora,
        completed=_pruned,
        refused=_unlike_adalora,
        conv1d=True,
    ),
    "oft": Row(OFTConfig, "OFT", {"v": Leaf("oft_R.weight", 2)}, _read_oft, _write_oft, agreed=_agreed_oft, idles=True),
}


def rows_of(peft_type: str) -> list[Row]:
    """Return the rows of a PEFT type, in the order in which they are tried."""
    return [row for row in ROWS.values() if row.peft_type == peft_type]
