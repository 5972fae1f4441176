"""The names of modules in these files: kohya's with underscores for dots, and diffusers' several ways to write a key."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors

from lora_lite.core.errors import listed, nearest
from lora_lite.files.header import VERSION
from lora_lite.files.kohya.methods import ALPHA, DOWN, METHODS, UP

KEYS = (ALPHA, *(key for method in METHODS.values() for key in method.keys))
_ENDS = {
    **{key: key for key in KEYS},
    **{"lora_A.weight": DOWN, "lora_B.weight": UP, "lora.down.weight": DOWN, "lora.up.weight": UP},
    **{"lora_A.default.weight": DOWN, "lora_B.default.weight": UP},
    **{"lora_linear_layer.down.weight": DOWN, "lora_linear_layer.up.weight": UP},
}
"""The ends of keys, diffusers' too, as kohya's."""
_KEY = re.compile(rf"(?:(.*)\.)?({'|'.join(map(re.escape, sorted(_ENDS, key=len, reverse=True)))})")
_OF_PROCESSOR = re.compile(r"(.*)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
"""Keys of diffusers' attention processors, before it took PEFT."""

PREFIXES = (
    *("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lora_prior_unet", "lora_prior_te", "lycoris"),
    *("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "diffusion_model", "prior", "base_model.model"),
)
"""The parts of a pipeline, as the tools write them before a module's name."""


def split(key: str) -> tuple[str, str] | None:
    """Return the name of the module, with its prefix, and the end of the key as kohya writes it. None for a key of another kind."""
    found = _OF_PROCESSOR.fullmatch(key)
    if found:
        return f"{found[1]}.to_{found[2]}{'.0' if found[2] == 'out' else ''}", DOWN if found[3] == "down" else UP
    found = _KEY.fullmatch(key)
    return (found[1] or "", _ENDS[found[2]]) if found else None


def prefix_of(name: str) -> str:
    """Return the known prefix of a module's name, or an empty one."""
    return next((p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith((f"{p}_", f"{p}."))), "")


def of_image_tools(path: Path) -> bool:
    """Whether a file is a safetensors file of these tools rather than one of `save`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return VERSION not in (file.metadata() or {}) and any(split(key) is not None for key in list(file.keys()))
    except Exception:  # damaged or foreign, which its reader says
        return False


class Names:
    """The names under which these files may have the modules of a model.

    Args:
        paths: the paths of the layers that can be adapted.
        renamed: from a path of an older version of the model's class to that of the model.
    """

    def __init__(self, paths: Iterable[str], renamed: Callable[[str], str]) -> None:
        self.paths, self.renamed = list(paths), renamed
        self.flat: dict[str, list[str]] = {}
        for path in self.paths:
            self.flat.setdefault(path.replace(".", "_"), []).append(path)

    def path(self, name: str) -> str:
        """Return the path that a name without its prefix means.

        Raises:
            ValueError: where the model has none or several.
        """
        if name in self.paths:
            return name
        found = self.flat.get(name.replace(".", "_"), []) or self._older(name)
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"ambiguous, it may mean {listed(found)}")
        raise ValueError(f"the model has no such layer; closest: {nearest(name.replace('.', '_'), self.flat, 1)}")

    def _older(self, name: str) -> list[str]:
        """List the paths of layers that an older version had under a name; its beginning may be one that is no more, as `text_model`."""
        beginnings = [(name[: -len(flat) - 1], paths) for flat, paths in self.flat.items() if name.endswith(f"_{flat}")]
        ways = [name, *(f"{beginning}.{path}" for beginning, paths in beginnings for path in paths)]
        return list(dict.fromkeys(path for way in ways if (path := self.renamed(way)) in self.paths))
