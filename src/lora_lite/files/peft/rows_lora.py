"""LoRA's family in PEFT's terms: methods that differ in the start, whose files are LoRA's."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from lora_lite.core.frozen import Constants
from lora_lite.core.plan import Target
from lora_lite.files.peft.biases import ADAPTED
from lora_lite.files.peft.fields import UNDROPPED, resolve
from lora_lite.files.peft.layers import is_embedding, not_linear
from lora_lite.files.peft.row import Fields, Leaf, Leaves, Row, Tensors, is_lowered
from lora_lite.variants.alora import ALoRAConfig
from lora_lite.variants.asvd import ASVDConfig
from lora_lite.variants.corda import CorDAConfig
from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.eva import EVAConfig
from lora_lite.variants.kasa import KaSAConfig
from lora_lite.variants.loftq import LoftQConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.lora_ga import LoRAGAConfig
from lora_lite.variants.mica import MiCAConfig
from lora_lite.variants.olora import OLoRAConfig
from lora_lite.variants.pissa import PiSSAConfig


def _read_lora(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    return {
        "r": tensors["lora_A.weight"].shape[-2],
        "alpha": abs(resolve(fields, "lora_alpha", path)),  # the sign is in B, see `positive`
        "rslora": resolve(fields, "use_rslora", path),
        "dropout": 0.0 if path in fields.get(UNDROPPED, ()) else resolve(fields, "lora_dropout", path),
    }


def positive(fields: Fields, path: str, tensors: Tensors) -> Tensors:
    """Return a layer's tensors for `|alpha|`: configs take no negative one, and `s B A = (-s) (-B) A`."""
    if fields["peft_type"] != "LORA" or resolve(fields, "lora_alpha", path) >= 0:
        return tensors
    return {key: -t if key.startswith("lora_B.") else t for key, t in tensors.items()}


def _read_plain(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    start = resolve(fields, "init_lora_weights", path)
    options = {"start": start if start in ("gaussian", "orthogonal") else "kaiming", "lora_bias": resolve(fields, "lora_bias", path)}
    return {**_read_lora(fields, path, tensors), **options, "bias": ADAPTED in tensors}


def _write_plain(cfg: LoRAConfig) -> dict[str, Any]:
    start = True if cfg.start == "kaiming" else cfg.start
    return {**_write_lora(cfg), "init_lora_weights": start, "lora_bias": cfg.lora_bias}


def _read_pissa(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    lora, asked = _read_lora(fields, path, tensors), resolve(fields, "r", path)
    r = lora["r"]
    lowered = is_lowered(r, asked, tensors)
    asked = asked if lowered else r  # PEFT takes the scale of the rank that was asked for
    alpha = lora["alpha"] * (math.sqrt(asked) if lora["rslora"] else 1)
    return {"r": r, "alpha": alpha * r / asked if lowered else alpha}


def _write_lora(cfg: Any) -> dict[str, Any]:
    alpha = int(cfg.alpha) if float(cfg.alpha).is_integer() else cfg.alpha
    fixed = {"use_dora": isinstance(cfg, DoRAConfig), "init_lora_weights": True, "lora_bias": False}
    dropout = getattr(cfg, "dropout", 0.0)
    return {"r": cfg.r, "lora_alpha": alpha, "use_rslora": cfg.rslora, "lora_dropout": dropout, **fixed}


class Weights(dict[str, float]):
    """PEFT's `kasa_config`, to be compared by its values."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))


def _read_kasa(fields: Fields, path: str, tensors: Tensors) -> dict[str, Any]:
    lora, weights = _read_lora(fields, path, tensors), fields["kasa_config"]
    del lora["dropout"]
    return {**lora, "start": "truncated", "beta": weights.get("beta", 1e-4), "gamma": weights.get("gamma", 1e-3)}


def _pissa_signs(theirs: Tensors, constants: Constants) -> Leaves:
    # Each pair of singular vectors is free to change its sign; the product does not depend on the choice.
    same = (theirs["dA"] * constants["A0"]).sum(1) >= 0
    signs = torch.where(same, 1.0, -1.0)
    return {"dA": signs[:, None], "dB": signs}


def _as_lora(cfg: PiSSAConfig, leaves: Leaves, constants: Constants) -> tuple[LoRAConfig, Leaves]:
    """Write `B A - B0 A0` as one product of twice the rank, `(B0 + dB) dA + dB A0`.

    Nothing cancels in this form, and the start stays exact."""
    A0, B0 = constants["A0"], constants["B0"]
    doubled = LoRAConfig(r=2 * cfg.r, alpha=2 * cfg.alpha, dtype=cfg.dtype)
    return doubled, {"A": torch.cat([leaves["dA"], A0]), "B": torch.cat([B0 + leaves["dB"], leaves["dB"]], dim=1)}


def _plain_lora(cfg: EVAConfig | LoftQConfig, leaves: Leaves, constants: Constants) -> tuple[LoRAConfig, Leaves]:
    return LoRAConfig(**{name: getattr(cfg, name) for name in ("r", "alpha", "rslora", "dropout", "dtype")}), leaves


def _agreed_dropout(layers: Sequence[tuple[Target, Fields]]) -> dict[str, Any]:
    """Return the dropout of all layers but embeddings, at which PEFT does not use it."""
    found = {fields["lora_dropout"] for target, fields in layers if not is_embedding(target)}
    return {"lora_dropout": found.pop()} if len(found) == 1 else {}


def _bias_of_start(cfg: LoRAConfig) -> str | None:
    return "lora_bias: PEFT has it with its default start alone" if cfg.lora_bias and cfg.start != "kaiming" else None


def _never(fields: Fields, tensors: Tensors) -> bool:
    return False  # such a file is one of LoRA


_LORA = {"A": Leaf("lora_A.weight", 2), "B": Leaf("lora_B.weight", 2)}

_OWN_BIAS = Leaf(ADAPTED, 1, lambda _, c: c["own_bias"], field="bias", optional=True)  # of layers that have one

ROWS: dict[str, Row] = {
    "alora": Row(
        ALoRAConfig,
        "LORA",
        _LORA,
        lambda fields, path, tensors: {**_read_lora(fields, path, tensors), "invocation_tokens": tuple(fields["alora_invocation_tokens"])},
        lambda cfg: {**_write_lora(cfg), "alora_invocation_tokens": cfg.invocation_tokens},
        when=lambda fields, _: bool(fields.get("alora_invocation_tokens")),
        refused=lambda cfg: None if cfg.invocation_tokens else "invocation_tokens=(): PEFT needs a token; it has this as LoRAConfig",
        conv1d=True,
    ),
    "kasa": Row(
        KaSAConfig,
        "LORA",
        {
            "dA": Leaf("lora_A.weight", 2, lambda _, c: c["A0"]),
            "dB": Leaf("lora_B.weight", 2, lambda _, c: c["B0"]),
            "dd": Leaf("lora_diag", 1, lambda cfg, c: c["S0"] / cfg.scale),
        },
        _read_kasa,
        lambda cfg: {**_write_lora(cfg), "kasa_config": Weights(beta=cfg.beta, gamma=cfg.gamma)},
        when=lambda fields, _: fields.get("kasa_config") is not None,  # an empty one has PEFT's defaults
        misread=not_linear,
    ),
    "pissa": Row(
        PiSSAConfig,
        "LORA",
        {"dA": Leaf("lora_A.weight", 2, lambda _, c: c["A0"]), "dB": Leaf("lora_B.weight", 2, lambda _, c: c["B0"])},
        _read_pissa,
        _write_lora,
        when=lambda fields, _: fields.get("init_lora_weights") == "pissa",
        lowers=True,
        signs=_pissa_signs,
        written=_as_lora,
        conv1d=True,
    ),
    "olora": Row(
        OLoRAConfig,
        "LORA",
        {"dA": Leaf("lora_A.weight", 2, lambda _, c: c["A0"]), "dB": Leaf("lora_B.weight", 2, lambda _, c: c["B0"])},
        _read_pissa,
        _write_lora,
        when=lambda fields, _: fields.get("init_lora_weights") == "olora",
        lowers=True,
        signs=_pissa_signs,
        written=_as_lora,
        conv1d=True,
        misread=not_linear,
    ),
    "mica": Row(
        MiCAConfig,
        "LORA",
        {"A": Leaf("lora_A.weight", 2)},
        _read_lora,
        lambda cfg: {**_write_lora(cfg), "init_lora_weights": "mica"},
        when=lambda fields, _: fields.get("init_lora_weights") == "mica",
        constants={"B": Leaf("lora_B.weight", 2)},
        saved=lambda _, constants: {"B": constants["B"]},
        conv1d=True,
    ),
    "dora": Row(
        DoRAConfig,
        "LORA",
        {**_LORA, "m": Leaf("lora_magnitude_vector", 1, lambda _, c: c["sqnorm"].sqrt())},
        _read_lora,
        _write_lora,
        when=lambda fields, _: bool(fields.get("use_dora")),
        conv1d=True,
    ),
    "lora": Row(
        LoRAConfig,
        "LORA",
        {**_LORA, "b": Leaf("lora_B.bias", 1, field="lora_bias"), "db": _OWN_BIAS},
        _read_plain,
        _write_plain,
        refused=_bias_of_start,
        agreed=_agreed_dropout,
        conv1d=True,
    ),
    "eva": Row(EVAConfig, "LORA", _LORA, _read_lora, _write_lora, when=_never, written=_plain_lora, conv1d=True),
    "corda": Row(CorDAConfig, "LORA", _LORA, _read_lora, _write_lora, when=_never, written=_as_lora, conv1d=True),
    "asvd": Row(ASVDConfig, "LORA", _LORA, _read_lora, _write_lora, when=_never, written=_as_lora, conv1d=True),
    "loftq": Row(LoftQConfig, "LORA", _LORA, _read_lora, _write_lora, when=_never, written=_plain_lora, conv1d=True),
    "lora_ga": Row(LoRAGAConfig, "LORA", _LORA, _read_lora, _write_lora, when=_never, written=_as_lora, conv1d=True),
}
