"""An adapter whose files do not say enough of its layers to read it without the base model: the facts of its files as they are."""

import json
import math
from pathlib import Path

from lora_lite.cli.table import Row
from lora_lite.core.config import AdapterConfig
from lora_lite.core.config_json import from_json
from lora_lite.core.errors import listed
from lora_lite.files.adapter_file import read
from lora_lite.files.header import BASE, CONSTANT
from lora_lite.files.kohya.names import of_image_tools
from lora_lite.files.peft.hub import CONFIG, WEIGHTS, around
from lora_lite.files.safetensors_file import tensors_of
from lora_lite.variants import VARIANTS


def header_rows(path: Path) -> tuple[list[Row], list[AdapterConfig], int] | None:
    """Return the rows, without norms, the configs and the number of values of a file that `save` wrote. None for anything else.

    Raises:
        ValueError: where the file is damaged or of a variant from outside the package.
    """
    if path.is_dir() or around(path) is not None or of_image_tools(path):
        return None
    header, tensors = read(path)
    unknown = [str(config["name"]) for config in header.configs if config["name"] not in VARIANTS] + [*header.classes.values()]
    if unknown:
        raise ValueError(
            f'expected variants that ship, found {listed(unknown)} in "{path}". Load it in Python: ll.load(..., variants=[...]).'
        )
    configs = [from_json(VARIANTS[config["name"]], config) for config in header.configs]
    rows = [
        Row(at, configs[t.config].name, (t.o, t.i), sum(math.prod(shape) for _, shape in t.params.values()), None, None, None)
        for at, t in header.targets.items()
    ]
    return rows, configs, sum(t.numel() for name, t in tensors.items() if not name.startswith((CONSTANT, BASE)))


def raw_text(folder: Path, as_json: bool) -> str | None:
    """Return the method and the tensors, with shapes and norms, of a folder of PEFT's. None for anything else.

    Raises:
        ValueError: where a file is damaged.
    """
    folder = around(folder) or folder
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        return None
    try:
        fields = dict(json.loads((folder / CONFIG).read_text("utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f'expected an adapter of PEFT\'s in "{folder}", found a damaged {CONFIG} ({e}). Save it again.') from e
    tensors = tensors_of("info", folder / WEIGHTS, "Save the adapter again.")[1]
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
