"""A loop that generates for requests of many adapters as they come: others join at any step, and leave when they are done.

Each step runs one token of all requests at hand through `adapt.mixed`, with a cache that grows and shrinks by rows. It is greedy, for a
decoder with full attention; `bench/serving.py` times it.
"""

import inspect
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import lora_lite as ll

CACHE = (
    "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
)  # transformers 5.24's name


@dataclass(eq=False)
class Request:
    """A prompt `(t,)` for the adapter of that number, how many tokens are wanted, and those made so far."""

    adapter: int
    prompt: Tensor
    wanted: int
    made: list[int] = field(default_factory=list)


class Loop:
    """Generate for the requests at hand, `rows` of them at most, one token a step.

    Args:
        adapt: the adapted model, in evaluation mode.
        stacked: the params of all adapters. Stack anew when their set changes, not at each step.
        rows: how many requests run at once.
        end: the token that ends an answer; None for none.
    """

    def __init__(self, adapt: ll.Adapt, stacked: Any, rows: int = 16, end: int | None = None) -> None:
        self.adapt, self.stacked, self.rows, self.end = adapt, stacked, rows, end
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.states: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, (rows, heads, t, d)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Make one token for each running request, and the first of those that join; return the requests that are done."""
        if self.running:
            last = torch.tensor([[request.made[-1]] for request in self.running], device=self.mask.device)
            self.mask = F.pad(self.mask, (0, 1), value=1)
            self.states = self._run(self.running, last, self.mask, self.states)
        new = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.rows - len(self.running)))]
        if new:
            longest = max(len(request.prompt) for request in new)
            ids = torch.stack([F.pad(request.prompt, (longest - len(request.prompt), 0)) for request in new])
            mask = torch.stack([F.pad(torch.ones_like(r.prompt), (longest - len(r.prompt), 0)) for r in new])
            self._join(mask, self._run(new, ids, mask, []))
            self.running += new
        done = [r for r in self.running if len(r.made) >= r.wanted or r.made[-1] == self.end]
        if done:
            self._keep([n for n, request in enumerate(self.running) if request not in done])
        return done

    def _run(self, requests: list[Request], ids: Tensor, mask: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        cache = transformers.DynamicCache(states)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # padding on the left does not count
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE: cache, "use_cache": True}
        logits = self.adapt.mixed(self.stacked, batch, [request.adapter for request in requests], logits_to_keep=1).logits
        for request, token in zip(requests, logits[:, -1].argmax(-1).tolist()):
            request.made.append(token)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _join(self, mask: Tensor, states: list[tuple[Tensor, Tensor]]) -> None:
        """Put rows below the others, the shorter padded on the left."""
        if not self.running:
            self.mask, self.states = mask, states
            return
        longest = max(mask.shape[1], self.mask.shape[1])
        self.mask = torch.cat([F.pad(m, (longest - m.shape[1], 0)) for m in (self.mask, mask)])
        both = [zip(old, new) for old, new in zip(self.states, states)]
        pads = [[torch.cat([F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in pair]) for pair in layer] for layer in both]
        self.states = [(keys, values) for keys, values in pads]

    def _keep(self, rows: list[int]) -> None:
        """Drop the other rows, and the columns that no row has any more."""
        self.running = [self.running[n] for n in rows]
        self.mask = self.mask[rows]
        first = int(self.mask.any(0).int().argmax()) if rows else 0
        self.mask = self.mask[:, first:]
        self.states = [(keys[rows, :, first:], values[rows, :, first:]) for keys, values in self.states]
