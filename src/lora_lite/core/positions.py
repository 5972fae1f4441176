"""Edits at the first and last positions of each row's prompt."""

from collections.abc import Callable

import torch
from torch import Tensor


def edited(edit: Callable[[Tensor], Tensor], h: Tensor, prompt: Tensor | None, ends: tuple[int, int]) -> Tensor:
    """Apply `edit` at the first and last positions of each row's prompt.

    Args:
        edit: a function of `(b, 2 s, d)`, the first `s` positions and the last `s`, `s` the larger of `ends`.
        h: hidden states `(b, t, d)`.
        prompt: `(b, t)`, True at the prompt, one span a row; None where every position is.
        ends: how many first and how many last positions, each at most half of the prompt.
    """
    b, t, d = h.shape
    if prompt is None:
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
