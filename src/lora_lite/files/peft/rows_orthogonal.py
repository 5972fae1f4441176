"""Rotations and reflections in PEFT's terms, beside those in `rows.py`."""

from lora_lite.files.peft.row import Leaf, Row
from lora_lite.variants.ether import ETHERConfig


def _beyond_one_reflection(cfg: ETHERConfig) -> str | None:
    if cfg.n_blocks > 1:
        return f"n_blocks={cfg.n_blocks}: PEFT reflects the whole input"
    return 'side="out": PEFT reflects inputs' if cfg.side == "out" else None


ROWS_ORTHOGONAL: dict[str, Row] = {
    "ether": Row(  # one reflection of the whole input, which PEFT has as an HRA of rank 1
        ETHERConfig,
        "HRA",
        {"u": Leaf("hra_u", 2, shape=(-1, 1))},
        lambda *_: {},
        lambda _: {"r": 1, "apply_GS": False},
        when=lambda _, tensors: tensors["hra_u"].shape[1] == 1,
        completed=lambda _, theirs: {"u": theirs["u"][None]},
        refused=_beyond_one_reflection,
    ),
}
