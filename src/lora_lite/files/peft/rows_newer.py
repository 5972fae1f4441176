"""PEFT's newer methods, in its terms."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lite.core.frozen import Constants, Frozen
from lora_lite.core.plan import Target
from lora_lite.files.peft.fields import DEFAULTS, resolve
from lora_lite.files.peft.row import Fields, Leaf, Leaves, Row, Tensors
from lora_lite.variants._subspaces import are_steady
from lora_lite.variants.adamss import AdaMSSConfig
from lora_lite.variants.deft import DEFTConfig, directions
from lora_lite.variants.glora import GLoRAConfig
from lora_lite.variants.osf import OSFConfig
from lora_lite.variants.peanut import PEANuTConfig
from lora_lite.variants.supertuning import SuperTuningConfig


def _read_deft(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {name: resolve(fields, name, path) for name in ("decomposition_method", "para")}
    found["r"] = tensors["deft_P"].shape[1]  # PEFT lowers r to the output's width in silence
    found["dropout"] = 0.0 if found["para"] else resolve(fields, "deft_dropout", path)  # PaRa applies none
    return {**found, "alpha": resolve(fields, "alpha", path) or None}


def _write_deft(cfg: DEFTConfig) -> dict[str, Any]:
    alpha = int(cfg.alpha) if cfg.alpha is not None and float(cfg.alpha).is_integer() else cfg.alpha
    return {"r": cfg.r, "alpha": alpha, "decomposition_method": cfg.decomposition_method, "para": cfg.para, "deft_dropout": cfg.dropout}


def _agreed_deft(layers: Sequence[tuple[Target, Fields]]) -> dict[str, Any]:
    """Return the largest rank, where the smaller ones are those to which PEFT lowers it."""
    r = max(fields["r"] for _, fields in layers)
    return {"r": r} if all(fields["r"] == min(r, target.o) for target, fields in layers) else {}


def _deft_start(cfg: DEFTConfig, W: Frozen, constants: Constants) -> Constants:
    """Derive PEFT's start of `R`, `U_0^T W / s`."""
    _, U0 = directions(constants["P0"], None, cfg.decomposition_method)
    return {**constants, "R0": U0.t() @ W.dense(U0.dtype) / cfg.scale}


def _turned(cfg: DEFTConfig, P: Tensor) -> Tensor:
    """Mark the rows of `R`, `(r, 1)`, that have another sign in PEFT's file: its orthonormal factor has LAPACK's signs."""
    if cfg.decomposition_method == "relu":
        return torch.zeros(P.shape[1], 1, dtype=torch.bool, device=P.device)
    return torch.linalg.qr(P.float()).R.diagonal()[:, None] < 0


def _from_lapack_signs(cfg: DEFTConfig, theirs: Leaves) -> Leaves:
    return {**theirs, "dR": torch.where(_turned(cfg, theirs["dP"]), -theirs["dR"], theirs["dR"])} if "dR" in theirs else theirs


def _to_lapack_signs(cfg: DEFTConfig, leaves: Leaves, constants: Constants) -> tuple[DEFTConfig, Leaves]:
    if cfg.para:
        return cfg, leaves
    turned, dR = _turned(cfg, constants["P0"] + leaves["dP"]), leaves["dR"].detach()
    return cfg, {**leaves, "dR": torch.where(turned, -dR - 2 * constants["R0"], dR)}


def _read_supertuning(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    found = {name: resolve(fields, name, path) for name in ("sparsity", "select_top", "r")}
    low_rank = {"alpha": resolve(fields, "lora_alpha", path), "dropout": resolve(fields, "lora_dropout", path)}
    return {**found, **low_rank} if found["r"] else found


def _write_supertuning(cfg: SuperTuningConfig) -> dict[str, Any]:
    low_rank = {"r": cfg.r, "lora_alpha": cfg.alpha, "lora_dropout": cfg.dropout}
    return {"sparsity": cfg.sparsity, "select_top": cfg.select_top, **low_rank}


def _groups_apart(tensors: Leaves, constants: Constants) -> Leaves:
    shapes = constants["shapes"].tolist()
    A, B = tensors["adamss_A.#"].split([rank for _, rank in shapes]), tensors["adamss_B.#"].split([size * rank for size, rank in shapes])
    of_A = {f"adamss_A.{n}": t for n, t in enumerate(A)}
    of_B = {f"adamss_B.{n}": t.view(*shape) for n, (t, shape) in enumerate(zip(B, shapes))}
    return {"adamss_newB": tensors["adamss_newB"], **of_A, **of_B}


def _by_rounding(cfg: AdaMSSConfig, W: Frozen) -> str | None:
    """Return why the groups of a layer are others in PEFT, or None. They are not in its files."""
    if W.device.type == "meta" or are_steady(cfg.factors(W)[0], min(cfg.num_subspaces, W.out_features)):
        return None
    way = "Merge it where it was trained, or train with a lower r"
    return f"has groups that rounding decides, as where r reaches the number of outputs, so that PEFT's are others. {way}"


_GLORA = ("r", "config_A_B", "config_C", "config_D_E")
_COLUMNS = {"A": "config_A_B", "B": "config_A_B", "C": "config_C"}


def _as_columns(cfg: GLoRAConfig, leaves: Leaves, constants: Constants) -> tuple[GLoRAConfig, Leaves]:
    """Return vectors in the shapes of PEFT, where those of `A`, `B` and `C` are columns."""
    columns = {name for name, field in _COLUMNS.items() if getattr(cfg, field) == "vector"} | {"Cu"}
    return cfg, {name: t.unsqueeze(1) if name in columns else t for name, t in leaves.items()}


def _from_columns(cfg: GLoRAConfig, theirs: Leaves) -> Leaves:
    return {name: t.flatten() if name in {"A", "B", "C", "Cu"} else t for name, t in theirs.items()}


def _read_osf(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    patterns = fields.get("rank_pattern") or {}
    # PEFT searches its patterns here, where it matches those of other methods.
    rank = next((rank for pattern, rank in patterns.items() if re.search(pattern, path)), fields.get("effective_rank"))
    return {"effective_rank": int(rank) if isinstance(rank, float) and rank > 1 else rank}


def _osf_signs(theirs: Tensors, constants: Constants) -> Leaves:
    signs = torch.where((theirs["dV"] * constants["V0"]).sum(1) >= 0, 1.0, -1.0)  # each pair of singular vectors may be turned
    return {"dU": signs, "dV": signs[:, None]}


_PEANUT = ("r", "depth", "act_fn", "scaling")
_SAME_FUNCTION = {
    **{"swish": "silu", "gelu_python": "gelu"},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"),
}

ROWS: dict[str, Row] = {
    "deft": Row(  # PEFT computes this one in float32 in a model of any dtype, so in float64 it is only as exact as that
        DEFTConfig,
        "DEFT",
        {
            "dP": Leaf("deft_P", 2, lambda _, c: c["P0"]),
            "dR": Leaf("deft_R", 2, lambda _, c: c["R0"], optional=True),
        },
        _read_deft,
        _write_deft,
        derived=_deft_start,
        completed=_from_lapack_signs,
        written=_to_lapack_signs,
        agreed=_agreed_deft,
        conv1d=True,
    ),
    "peanut": Row(
        PEANuTConfig,
        "PEANUT",
        {
            **{"A": Leaf("peanut_A.weight", 2), "B": Leaf("peanut_B.weight", 2)},
            **{"E": Leaf("peanut_encoders.#.weight", 3, field="depth"), "D": Leaf("peanut_decoders.#.weight", 3, field="depth")},
        },
        lambda fields, path, _: {name: _SAME_FUNCTION.get(v := resolve(fields, name, path), v) for name in _PEANUT},
        lambda cfg: {name: getattr(cfg, name) for name in _PEANUT},
    ),
    "glora": Row(
        GLoRAConfig,
        "GLORA",
        {
            f"{path}{part}": Leaf(f"glora_{path}.X{part}", (1, 2), optional=True)
            for path in "ABCDE"
            for part in ("d", "u", "")
            if part == "" or path in "ABC"
        },
        lambda fields, path, _: {name: resolve(fields, name, path) for name in _GLORA},
        lambda cfg: {name: getattr(cfg, name) for name in _GLORA},
        zeros={"glora_A.zeros": "oi", "glora_B.zeros": "oi", "glora_C.zeros": "i1", "glora_D.zeros": "o", "glora_E.zeros": "o"},
        completed=_from_columns,
        written=_as_columns,
    ),
    "adamss": Row(
        AdaMSSConfig,
        "ADAMSS",
        {"A": Leaf("adamss_A.#", 2, joined=True), "B": Leaf("adamss_B.#", 1, joined=True)},
        lambda fields, path, _: {name: resolve(fields, name, path) for name in DEFAULTS["ADAMSS"]},
        lambda cfg: {name: getattr(cfg, name) for name in DEFAULTS["ADAMSS"]},
        constants={"V": Leaf("adamss_newB", 2), "shapes": Leaf("adamss_B.#.shapes", 2, floating=False, implied=True)},
        saved=lambda _, constants: {"V": constants["V"]},
        apart=_groups_apart,
        unsure=_by_rounding,
    ),
    "osf": Row(
        OSFConfig,
        "OSF",
        {
            "dU": Leaf("osf_svd_params.U_low", 2, lambda _, c: c["U0"]),
            "dS": Leaf("osf_svd_params.S_low", 1, lambda _, c: c["S0"]),
            "dV": Leaf("osf_svd_params.V_low", 2, lambda _, c: c["V0"]),
        },
        _read_osf,
        lambda cfg: {"effective_rank": cfg.effective_rank},
        signs=_osf_signs,
        idles=True,
    ),
    "supertuning": Row(
        SuperTuningConfig,
        "SUPERTUNING",
        {
            "s": Leaf("supertuning_values", 1),
            **{name: Leaf(f"supertuning_lora_{name}.weight", 2, field="r") for name in ("A", "B")},
        },
        _read_supertuning,
        _write_supertuning,
        constants={"indices": Leaf("supertuning_indices", 1, floating=False, optional=True)},
        saved=lambda _, constants: {"indices": constants["indices"]},
    ),
}
