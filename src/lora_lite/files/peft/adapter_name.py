"""Keys with more inside than PEFT saves: the adapter's name, `lora_A.default.weight` for `lora_A.weight`, and torch's wrappers."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lora_lite.files.peft.layers import EMBEDDING, MAGNITUDE

_NAME = "default"
"""The name under which PEFT loads an adapter; a key with any other is one of no adapter there."""
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""The modules that `torch.compile`, FSDP and activation checkpointing put around others."""


def unwrapped(key: str) -> str:
    """Return a key without the names of torch's wrappers, which a state dict of a wrapped model has inside."""
    return _WRAPPER.sub("", key)


def without_name(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Return a file's tensors under the keys that PEFT saves. `keys` are the ends that a layer's tensors may have."""
    ends = {_named(key): key for key in (*keys, *EMBEDDING) if "#" not in key} | {f"{_named(MAGNITUDE)}.weight": MAGNITUDE}
    ending = re.compile(rf"(.*\.)({'|'.join(map(re.escape, ends))})")
    bare = {name: unwrapped(name) for name in tensors}
    plain = {name: found[1] + ends[found[2]] if (found := ending.fullmatch(own)) else own for name, own in bare.items()}
    return {name if plain[name] in tensors else plain[name]: tensor for name, tensor in tensors.items()}


def _named(key: str) -> str:
    first, dot, rest = key.partition(".")
    return f"{first}.{_NAME}{dot}{rest}"
