"""Invocations: the tokens of a text from which on an adapter acts, in whole texts and in those that a cache continues."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACTIVE = "_lora_lite_active"
"""The buffer of a target that masks the positions at which it acts during a call: `(b, t)`, or None for all."""
_STARTS = "_lora_lite_starts"
"""The attribute of a cache that has the position of each row's invocation."""
_NEVER = 2**62
"""The position of an invocation that a row has not."""


@dataclass(frozen=True)
class Invocation:
    """The last occurrence of some tokens in each row of `input_ids`, from which on an adapter acts.

    A call that continues a key-value cache knows from the cache where the invocation was, if a call of the same model filled it.

    Args:
        tokens: the sequence.
    """

    tokens: tuple[int, ...]

    def __call__(self, root: nn.Module, given: Mapping[str, Any]) -> tuple[Tensor | None, Callable[[Any], None]]:
        """Return the mask `(b, t)` of a call's positions, and a function that notes in the output's cache where they begin.

        Raises:
            ValueError: where a model that takes `input_ids` is given none, or is an encoder-decoder model.
        """
        if "input_ids" not in given:
            return None, _nothing
        if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"aLoRA: expected a model with a decoder alone, found the encoder-decoder {type(root).__name__}. Use LoRAConfig."
            )
        ids = given["input_ids"]
        if not isinstance(ids, Tensor):
            raise ValueError(
                "aLoRA: expected input_ids, in which the invocation is looked for, found none. Pass input_ids beside other inputs, or use "
                "LoRAConfig, which acts at every position."
            )
        ids = ids.reshape(-1, ids.shape[-1])
        cache: Any = given.get("past_key_values", given.get("cache"))
        past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        begin = self.starts(ids, past, getattr(cache, _STARTS, None))

        def remember(output: Any) -> None:
            for filled in (cache, getattr(output, "past_key_values", None)):
                if hasattr(filled, "get_seq_length"):
                    setattr(filled, _STARTS, begin)

        return torch.arange(ids.shape[1], device=ids.device) + past >= begin[:, None], remember

    def starts(self, ids: Tensor, past: int, before: Tensor | None) -> Tensor:
        """Return the position from which on each row is adapted, `(b,)`, with `before` where the tokens stand in none of `ids (b, t)`."""
        b, t = ids.shape
        windows = t - len(self.tokens) + 1
        earlier = torch.full((b,), _NEVER, device=ids.device)
        if before is not None:  # a cache of fewer rows has been repeated for each, as beams are
            before = before.to(ids.device).repeat_interleave(max(1, b // max(1, len(before))))
            earlier = torch.where(before < past, before, earlier)  # else it has been cropped since
        if windows < 1:
            return earlier
        same = torch.ones(b, windows, dtype=torch.bool, device=ids.device)
        for n, token in enumerate(self.tokens):
            same = same & (ids[:, n : n + windows] == token)
        last = torch.where(same, torch.arange(windows, device=ids.device), -1).amax(1)
        return torch.where(last >= 0, last + past, earlier)


def aligned(active: Tensor, x: Tensor) -> Tensor:
    """Return a mask `(b, t)` for vectors `x`: in rows `(b, t, i)`, one after the other `(b t, i)`, or the last positions of each row.

    Raises:
        ValueError: where the vectors have another layout.
    """
    shape = x.shape[:-1]
    if active.shape == shape:
        return active
    if active.numel() == shape.numel():
        return active.reshape(shape)
    if len(shape) == 2 and shape[0] == active.shape[0] and shape[1] < active.shape[1]:
        return active[:, active.shape[1] - shape[1] :]  # as a head that is called at the end
    raise ValueError(
        f"acts_at: expected an input with the {tuple(active.shape)} positions of its mask, found shape {tuple(x.shape)}. Leave the layer "
        "out with exclude_names, e.g. those of images and of routed experts."
    )


def _nothing(output: Any) -> None:
    pass


def is_cache(value: object) -> bool:
    """Whether something is a cache of keys and values, or of states, as transformers has them."""
    return hasattr(value, "get_seq_length")
