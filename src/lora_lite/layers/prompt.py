"""The prompt of each row of a batch, noted at each call for the blocks that a variant edits.

Positions that the attention mask keeps are prompt, up to the first whose label counts. Positions that a key-value cache already holds are
not seen again, and what is generated is no prompt.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PROMPT = "_lora_lite_prompt"
"""The buffer of a target block that masks the prompt's positions during a call: `(b, t)`, or None for all."""
IGNORED = -100
"""The label of a position that takes no part in the loss."""
_NOTED = "_lora_lite_blocks"


def note_prompt(clone: nn.Module, path: str) -> None:
    """Make a copy's root note the prompt for the block at `path`."""
    clone.get_submodule(path).register_buffer(PROMPT, None, persistent=False)
    if _NOTED not in vars(clone):
        own = vars(clone).pop("forward", None) or functools.partial(type(clone).forward, clone)
        forward = functools.partial(_forward, clone, own, tuple(inspect.signature(own).parameters))
        vars(forward)["__signature__"] = inspect.signature(own)  # generate asks for it
        vars(clone)["forward"] = forward
    vars(clone)[_NOTED] = (*vars(clone).get(_NOTED, ()), path)


def _forward(root: nn.Module, own: Any, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    given = {**dict(zip(names, args)), **kwargs}
    paths = vars(root)[_NOTED]
    masks = _prompts(given, bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False)))
    with _noted([root.get_submodule(path) for path in paths], [masks[int("decoder" in path)] for path in paths]):
        return own(*args, **kwargs)


def _prompts(given: Mapping[str, Any], encoder_decoder: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks of prompt positions, for blocks in general and for the decoder's of an encoder-decoder model."""
    later = _nothing(given, ("decoder_input_ids", "decoder_inputs_embeds") if encoder_decoder else ("input_ids", "inputs_embeds"))
    attended = _attended(given.get("attention_mask"))
    if encoder_decoder:
        return attended, _attended(given.get("decoder_attention_mask")) if later is None else later
    prompt = _before_labels(attended, given.get("labels")) if later is None else later
    return prompt, prompt


def _attended(mask: Any) -> Tensor | None:
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _before_labels(attended: Tensor | None, labels: Any) -> Tensor | None:
    """Cut the prompt off at the first label that counts. A row where that leaves no position is prompt as a whole."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or (attended is not None and attended.shape != labels.shape):
        return attended
    attended = torch.ones_like(labels, dtype=torch.bool) if attended is None else attended
    before = attended & ((labels != IGNORED) & attended).long().cumsum(1).eq(0)
    return torch.where(before.any(1, keepdim=True), before, attended)


def _nothing(given: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Return a mask without a position where the call continues a cached prefix, else None."""
    cache: Any = given.get("past_key_values", given.get("cache"))  # the newer name of transformers 5.24
    if not hasattr(cache, "get_seq_length") or not cache.get_seq_length() > 0:
        return None
    tokens = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    return None if tokens is None else torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


@contextmanager
def _noted(blocks: list[nn.Module], masks: list[Tensor | None]) -> Iterator[None]:
    before = [block._buffers[PROMPT] for block in blocks]
    try:
        for block, mask in zip(blocks, masks):
            block._buffers[PROMPT] = mask
        yield
    finally:
        for block, mask in zip(blocks, before):
            block._buffers[PROMPT] = mask
