"""An adapter whose files do not say which layers it was made for: its tensors as they are."""

import json
from pathlib import Path

import safetensors.torch

from lora_lite.files.peft.hub import CONFIG, WEIGHTS


def raw_text(folder: Path, as_json: bool) -> str | None:
    """Return the method and the tensors, with shapes and norms, of a folder of PEFT's. None for anything else.

    Raises:
        ValueError: where a file is damaged.
    """
    folder = folder.parent if folder.name == CONFIG else folder
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        return None
    try:
        fields = dict(json.loads((folder / CONFIG).read_text("utf-8")))
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except Exception as e:
        raise ValueError(f'expected an adapter of PEFT\'s in "{folder}", found damaged files ({e}). Save it again.') from e
    facts = [(name, tuple(t.shape), float(t.double().norm())) for name, t in tensors.items()]
    total = sum(t.numel() for t in tensors.values())
    if as_json:
        found = [{"tensor": name, "shape": shape, "norm": size} for name, shape, size in facts]
        return json.dumps({"peft_type": fields.get("peft_type"), "params": total, "tensors": found}, indent=2)
    width = max((len(name) for name, _, _ in facts), default=0)
    lines = [f"{name.ljust(width)}  {shape!s:<16}  {size:.4g}" for name, shape, size in facts]
    head = (
        f"{fields.get('peft_type')}: {total:,} values in {len(facts)} tensors. The files do not describe their layers: pass --base MODEL."
    )
    return "\n".join([head, "", f"{'tensor'.ljust(width)}  {'shape':<16}  norm", *lines])
