"""The prompt of each row of a batch, noted at each call for the blocks that a variant edits.

Positions that the attention mask keeps are prompt, up to the first whose label counts. Positions that a key-value cache already holds are
not seen again, and what is generated is no prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.layers.notes import note

PROMPT = "_lora_lite_prompt"
"""The buffer of a target block that masks the prompt's positions during a call: `(b, t)`, or None for all."""
IGNORED = -100
"""The label of a position that takes no part in the loss."""


@dataclass(frozen=True)
class Prompt:
    """The positions of the prompt, of blocks in general or of the decoder's in an encoder-decoder model."""

    decoder: bool

    def __call__(self, root: nn.Module, given: Mapping[str, Any]) -> tuple[Tensor | None, Callable[[Any], None]]:
        """Return the mask of a call's positions, and nothing to do after it."""
        masks = _prompts(given, bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False)))
        return masks[int(self.decoder)], lambda output: None


def note_prompt(clone: nn.Module, path: str) -> None:
    """Make a copy's root note the prompt for the block at `path`."""
    note(clone, path, PROMPT, Prompt("decoder" in path))


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
