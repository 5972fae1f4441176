"""Adapters of PEFT's files on weights that modules share, where training or the result would be another here."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_lite.core.errors import listed
from lora_lite.files.peft.fields import shifts_weights
from lora_lite.prepare.targets import sharing


def faults(model: nn.Module, fields: Mapping[str, Any], adapted: Iterable[str], tables: Iterable[str]) -> list[str]:
    """List the adapters of a file on shared weights that cannot be read.

    Args:
        model: the model.
        fields: those of the file's config.
        adapted: paths of the layers and modules of the file.
        tables: paths of the embeddings whose tokens the file trains.
    """
    shared, paths = sharing(model), list(adapted)
    tied = [path for path in paths if path in shared] if fields.get("ensure_weight_tying") else []
    of_rows = {path: [other for other in shared.get(path, ()) if other in paths] for path in tables}
    clashes = [*_apart(tied[:1], shared), *(_below(path, others) for path, others in of_rows.items() if others)]
    return clashes + [f'"{path}": {why}' for path in paths if (why := shifted(model, fields, path))]


def shifted(model: nn.Module, fields: Mapping[str, Any], path: str) -> str | None:
    """Return the reason why PEFT's start at a layer changes other modules too, or None."""
    others = sharing(model).get(path, ()) if shifts_weights(fields) else ()
    if not others:
        return None
    return (
        f"PEFT takes its start off the weight, which {listed(others)} shares: that one computes something else there. Run the adapter by "
        "PEFT, or train one without this layer"
    )


def _apart(tied: Iterable[str], shared: Mapping[str, Iterable[str]]) -> list[str]:
    return [
        f'ensure_weight_tying: expected it off at "{path}", which shares its weight with {listed(shared[path])}: here each is trained by '
        "itself. For PEFT's outputs set it to false in the file, and name all of them in its modules_to_save where that has one"
        for path in tied
    ]


def _below(path: str, others: list[str]) -> str:
    return (
        f'"{path}": its trained rows move {listed(others)} too, which shares its weight and has an adapter of its own in the file. '
        "No adapter here has both: train one of them without the other"
    )
