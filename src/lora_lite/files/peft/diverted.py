"""Layers whose names PEFT takes for those of single experts, in models that keep all experts in one parameter.

PEFT fits LoRA's configs of older files to such models. For each name in `target_modules` that is a single expert's, it asks for the
parameter of all experts instead, without a word. It goes by the type of the model and the end of the name, so that dense layers and shared
experts would be left out. Their weights are named among `target_parameters`, which PEFT takes as they are.
"""

from collections.abc import Iterable
from typing import Any

from lora_lite.core.config import AdapterConfig
from lora_lite.core.plan import Target
from lora_lite.core.tree import join
from lora_lite.files.peft.layers import is_linear

_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
"""The names of single experts and routers that PEFT looks for, by the way in which transformers fuses the experts."""
_PLAIN = ("lora", "pissa", "olora", "eva", "loftq", "corda", "asvd", "lora_ga")
"""The variants whose files are of plain LoRA, which is all that PEFT has at a parameter."""


def diverted(model: Any, targets: Iterable[Target], method: str) -> dict[str, str]:
    """Return the names of the weights by which a file of a PEFT type has to ask for such layers, by the paths of the layers."""
    names = _NAMES.get(_fusion(model), ()) if method == "LORA" else ()
    return {t.path: join(t.path, "weight") for t in targets if t.path.rpartition(".")[2] in names and t.kind.host(t.path) == t.path}


def fault(model: Any, target: Target, cfg: AdapterConfig, method: str) -> str | None:
    """Return the reason why PEFT cannot keep a variant at such a layer, or None."""
    if not diverted(model, [target], method):
        return None
    more = [name for name in ("dropout", "lora_bias", "bias") if getattr(cfg, name, False)]
    found = "another method" if cfg.name not in _PLAIN else "no dense weight" if not is_linear(target) else ", ".join(more)
    if not found:
        return None
    out = " The same params fit a config with dropout=0.0." if found == "dropout" else ""
    return f'at a name that PEFT takes for the experts of a "{model.config.model_type}": it has plain LoRA alone there, found {found}.{out}'


def _fusion(model: Any) -> str:
    """Return the model type whose way of fusing experts the model has, by transformers' table; empty for none."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers before version 5, which fuses none
        return ""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return "mixtral" if kind == "mixtral" else str(getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind, ""))
