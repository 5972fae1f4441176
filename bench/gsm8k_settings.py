"""The settings of a run of `gsm8k.py`: those of the two tables that wassname/lora-lite published, and each variant's own in them.

Departures: params are float32, where the lineage's are bfloat16, which rounds small steps away; `--set dtype=bfloat16` gives its own. HRA's
row of the first table is of batches of 2, for lack of memory there: `--rows 2`.
"""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import lora_lite as ll

OWN: dict[str, dict[str, Any]] = {
    "ia3": {"rate": 5e-3, "targets": r"(k_proj|v_proj)$"},
    "ia3_ff": {"rate": 5e-3, "targets": r"down_proj$"},
    "delora": {"rate": 1e-3},
    "antipasto": {"rate": 5e-3, "r": 256},
    "lora_xs": {"rate": 4e-3},
}
"""What a variant has in both tables in place of LoRA's."""
UNSCALED = ("pissa", "lora_xs")  # alpha is the rank
FIELDS: dict[str, dict[str, Any]] = {"delora": {"lambda0": 0.1}, "road": {"group_size": 64}}
CORE = {"qwen3.5": {"antipasto": (("core", "gain"),)}}  # its row is the rotation's in the first table, the gain's in the second
CALIBRATION = {"eva": 4}  # batches; 64 for what estimates a covariance


@dataclass(frozen=True)
class Settings:
    """A run. Rows are of one pass; a step adds up the gradients of `accumulate` passes.

    Raises:
        ValueError: for a number out of range; it lists each.
    """

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

    def __post_init__(self) -> None:
        counts = ("r", "steps", "rows", "accumulate", "longest", "new_tokens", "eval_rows", "valid", "test")
        wrong = [f"{name}={value}" for name in counts if (value := getattr(self, name)) is not None and value < 1]
        wrong += [] if self.rate > 0 else [f"rate={self.rate}"]
        if wrong:
            raise ValueError(f"gsm8k: expected counts of at least 1 and a rate above 0, found {', '.join(wrong)}. Correct these.")


TABLES = {
    "qwen3": Settings(),
    "qwen3.5": Settings(model="Qwen/Qwen3.5-0.8B-Base", targets=r"down_proj$", steps=2500, rows=2, accumulate=4, longest=512, eval_rows=16),
}
"""The settings of the lineage's two published tables; AdamW with decay 0.1, cosine to zero, gradients clipped to norm 1 in both."""


def published(table: str, **given: Any) -> Settings:
    """Give a variant's settings in one of the tables, changed by those that are given; given fields come after the table's."""
    variant = given.get("variant", "lora")
    own = OWN.get(variant, {}) | given
    own |= {"fields": tuple({**dict(CORE.get(table, {}).get(variant, ())), **dict(given.get("fields", ()))}.items())}
    if variant in UNSCALED and "alpha" not in given:
        own["alpha"] = float(own.get("r", TABLES[table].r))
    return dataclasses.replace(TABLES[table], **own)


def config(s: Settings) -> ll.AdapterConfig:
    """Make the variant's config: the run's rank and targets, the lineage's choices for it, then what the run sets.

    Raises:
        ValueError, TypeError: for a field that the variant lacks or a value that it refuses.
    """
    cls = ll.VARIANTS[s.variant]
    if cls.original:
        raise ValueError(
            f'gsm8k: expected a variant that starts from the weights as they are, found "{s.variant}", which asks for those from before '
            "quantisation. On a dense model it is LoRA: use --variant lora."
        )
    known = list(inspect.signature(cls).parameters)
    unknown = [name for name, _ in s.fields if name not in known]
    if unknown:
        raise ValueError(f"gsm8k: expected --set to name fields of {cls.__name__}, {', '.join(known)}, found {unknown}. Name one of them.")
    general: dict[str, Any] = {"r": s.r, "alpha": s.alpha, "init_r": s.r * 3 // 2, "target_r": s.r, "total_step": s.steps}
    general |= {"target_names": s.targets} if cls.adapts in ("linear", "module") else {}  # norms and blocks have names of their own
    return cls(**{**{k: v for k, v in general.items() if k in known}, **FIELDS.get(s.variant, {}), **dict(s.fields)})
