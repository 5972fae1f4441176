"""The settings of a run of `gsm8k.py`: those of the two tables that wassname/lora-lite published, and each variant's own in them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import lora_lite as ll

RATES = {"delora": 1e-3, "ia3": 5e-3, "ia3_ff": 5e-3, "antipasto": 5e-3}  # where it isn't LoRA's 1e-4
TARGETS = {"ia3": r"(k_proj|v_proj)$", "ia3_ff": r"down_proj$"}  # where the variant has its own
FIELDS: dict[str, dict[str, Any]] = {
    "pissa": {"alpha": 32.0},
    "delora": {"lambda0": 0.1},
    "road": {"group_size": 64},
    "antipasto": {"r": 256},
}
CALIBRATION = {"eva": 4}  # batches; 64 for what estimates a covariance


@dataclass(frozen=True)
class Settings:
    """A run. Rows are of one pass; a step adds up the gradients of `accumulate` passes."""

    model: str = "Qwen/Qwen3-0.6B-Base"
    variant: str = "lora"
    fields: tuple[tuple[str, Any], ...] = ()
    targets: str = r"(q_proj|v_proj)$"
    r: int = 32
    alpha: float = 64.0
    steps: int = 5000
    rows: int = 4
    accumulate: int = 1
    rate: float = 1e-4
    longest: int = 768
    new_tokens: int = 300
    eval_rows: int = 50
    valid: int = 50
    test: int | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    train_data: str = "meta-math/MetaMathQA"
    test_data: str = "openai/gsm8k"


TABLES = {
    "qwen3": Settings(),
    "qwen3.5": Settings(model="Qwen/Qwen3.5-0.8B-Base", targets=r"down_proj$", steps=2500, rows=2, accumulate=4, longest=512, eval_rows=16),
}
"""The settings of the lineage's two published tables; AdamW with decay 0.1, cosine to zero, gradients clipped to norm 1 in both."""


def config(s: Settings) -> ll.AdapterConfig:
    """Make the variant's config: the run's rank and targets, the lineage's choices for it, then what the run sets."""
    cls = ll.VARIANTS[s.variant]
    known = {f.name for f in dataclasses.fields(cls)}
    general: dict[str, Any] = {"r": s.r, "alpha": s.alpha, "init_r": s.r * 3 // 2, "target_r": s.r, "total_step": s.steps}
    general |= {"target_names": s.targets} if cls.adapts in ("linear", "module") else {}  # norms and blocks have names of their own
    return cls(**{**{k: v for k, v in general.items() if k in known}, **FIELDS.get(s.variant, {}), **dict(s.fields)})
