r"""aLoRA: LoRA that acts from an invocation on, a sequence of tokens, and leaves the base model's states before it.

$$y_t = W x_t + b + [t \ge t_0]\, s\, B (A\, \mathrm{drop}(x_t)), \qquad s = \alpha / r \ \text{ or, rank-stabilised, } \alpha / \sqrt{r}$$

`t_0` is where the last occurrence of the invocation begins in the row's `input_ids`; a row without one is the base model's. So keys and
values before the invocation are those of the base model to the bit, and a cache that the base or another such adapter has filled serves.

Identity at init: exact, since `B = 0`.

Paper: Greenewald, Lastras, Parnell, Shah, Popa, Zizzo, Gunasekara, Rawat, Cox, *Activated LoRA: Fine-tuned LLMs for Intrinsics*, 2025,
arXiv:2504.12397.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | uniform within 1/sqrt(i) |
| `B` | `(o, r)` | yes | zeros |

Trained per target: `r (i + o)`. Needs nothing of the weight but its output. It cannot be merged.

A call that continues a cache takes the invocation's place from the cache. One that a call of the adapted model filled knows it, one that
the base model filled has none. `generate` of `adapt.module(params)` goes on so by itself. An invocation that two calls share is not seen,
and an earlier one holds until a later one comes. In a model that takes no `input_ids` every position is adapted.

Departures: an invocation of one token that `generate` adds itself is one too, as it is in the finished text. PEFT looks once, at the
prompt. Where only `inputs_embeds` are given PEFT warns and runs the base model, and here it is an error. `alpha` defaults to 16, twice
PEFT's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Frozen, Params, add_low_rank, checked
from lora_lite.core.fields import are_integers, at, expect
from lora_lite.core.invocation import Invocation, aligned
from lora_lite.variants.lora import LowRankConfig


class ALoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]


@checked
def alora(
    params: ALoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0, active: Tensor | None = None
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale B A drop(x)` at the positions that `active` has, and `W x + b` elsewhere. None has all."""
    h = W.project(x, params["A"], dropout)
    if active is not None:
        h = torch.where(aligned(active, h)[..., None], h, 0)
    return add_low_rank(W(x), h, params["B"], scale)


@dataclass(frozen=True, kw_only=True)
class ALoRAConfig(LowRankConfig):
    """Config of aLoRA.

    Args:
        invocation_tokens: the token ids from whose last occurrence on the adapter acts. Empty for every position, as LoRA acts.
    """

    name = "alora"
    uses = frozenset({"output", "project", "positions"})
    linear = False

    invocation_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        ids: Any = self.invocation_tokens
        if not are_integers(ids):
            where = at(self, "invocation_tokens")
            raise TypeError(
                f"{where} a sequence of integers, found {ids!r}. Tokenise it: tokenizer.encode(text, add_special_tokens=False)."
            )
        negative = [i for i in ids if i < 0]
        expect(self, "invocation_tokens", not negative, "ids >= 0", "Take them as the tokeniser returns them.")
        object.__setattr__(self, "invocation_tokens", tuple(ids))

    @property
    def acts_at(self) -> Invocation | None:
        """The positions of a call at which the adapter acts; None for all."""
        return Invocation(tuple(self.invocation_tokens)) if self.invocation_tokens else None

    def init(self, W: Frozen, generator: torch.Generator) -> ALoRAParams:
        A, B = W.low_rank_start(self.r, generator)
        return {"A": A, "B": B}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return alora(params, W, x, scale=self.scale, dropout=self.dropout, active=W.active)
