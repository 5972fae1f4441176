"""The prompt of each row of a batch, and edits at its first and last positions.

The model's root notes, at each call, which positions of the batch are prompt: those that the attention mask keeps, up to the first whose
label counts. Positions that a key-value cache already holds are not seen again, and what is generated is no prompt.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.core.subclass import derived

PROMPT = "prompt"
"""The buffer of a target block that holds which positions are prompt during a call: `(b, t)`, or None for all."""
IGNORED = -100
"""The label of a position that takes no part in the loss."""


def edited(edit: Callable[[Tensor], Tensor], h: Tensor, prompt: Tensor | None, ends: tuple[int, int]) -> Tensor:
    """Apply `edit` at the first and last positions of each row's prompt.

    Args:
        edit: a function of `(b, 2 s, d)`, the first `s` positions and the last `s`, `s` the larger of `ends`.
        h: hidden states `(b, t, d)`.
        prompt: `(b, t)`, True at the prompt, one span a row; None, or of another shape, where every position is.
        ends: how many first and how many last positions, each at most half of the prompt.
    """
    b, t, d = h.shape
    if prompt is None or prompt.shape != (b, t):
        start, length = torch.zeros(b, dtype=torch.long, device=h.device), torch.full((b,), t, device=h.device)
    else:
        prompt = prompt.to(h.device).long()
        start, length = prompt.argmax(1), prompt.sum(1)
    slots = torch.arange(max(ends), device=h.device)
    first, last = start[:, None] + slots, (start + length)[:, None] - 1 - slots.flip(0)
    counts = [(length // 2).clamp(max=end)[:, None] for end in ends]
    valid = torch.cat([slots < counts[0], slots.flip(0) < counts[1]], dim=1)[..., None]  # (b, 2 s, 1)
    index = torch.cat([first, last], dim=1).clamp(0, t - 1)[..., None].expand(-1, -1, d)
    chosen = h.gather(1, index)
    # Added, not put in place: slots that are not valid may point where others do.
    return h.scatter_add(1, index, torch.where(valid, edit(chosen) - chosen, 0))


@functools.cache
def prompted_class(cls: Any) -> Any:
    """Make the subclass of a model's class that notes the prompt for its edited blocks; the same one for the same class."""
    names = [name for name in inspect.signature(cls.forward).parameters][1:]

    @functools.wraps(cls.forward)  # generate asks for the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        paths = vars(self)["_lora_lite_edited"]
        masks = _prompts(given, bool(getattr(getattr(self, "config", None), "is_encoder_decoder", False)))
        with _noted([self.get_submodule(path) for path in paths], [masks["decoder" in path] for path in paths]):
            return cls.forward(self, *args, **kwargs)

    return derived(prompted_class, cls, forward=forward)


def note_prompts(clone: nn.Module, paths: Sequence[str]) -> None:
    """Make a clone's root note the prompt for the blocks at `paths`."""
    if paths:
        clone.__class__ = prompted_class(type(clone))  # type: ignore[arg-type]
        vars(clone)["_lora_lite_edited"] = tuple(paths)
        for path in paths:
            clone.get_submodule(path).register_buffer(PROMPT, None, persistent=False)


def _prompts(given: Mapping[str, Any], encoder_decoder: bool) -> tuple[Tensor | None, Tensor | None]:
    """Give which positions are prompt, for blocks in general and for those of the decoder of an encoder-decoder model."""
    later = _nothing(given, ("decoder_input_ids", "decoder_inputs_embeds") if encoder_decoder else ("input_ids", "inputs_embeds"))
    kept = _kept(given.get("attention_mask"))
    if encoder_decoder:
        return kept, _kept(given.get("decoder_attention_mask")) if later is None else later
    prompt = _before_labels(kept, given.get("labels")) if later is None else later
    return prompt, prompt


def _kept(mask: Any) -> Tensor | None:
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _before_labels(kept: Tensor | None, labels: Any) -> Tensor | None:
    """Take away the positions from the first label that counts; rows where that leaves nothing are prompt as a whole."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or (kept is not None and kept.shape != labels.shape):
        return kept
    kept = torch.ones_like(labels, dtype=torch.bool) if kept is None else kept
    before = kept & ((labels != IGNORED) & kept).long().cumsum(1).eq(0)
    return torch.where(before.any(1, keepdim=True), before, kept)


def _nothing(given: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Give no position at all where the call continues a cached prefix, else None."""
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
