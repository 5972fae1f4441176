r"""MiSS: one matrix that all shards of the weight's columns share.

$$y = W x + b + D^T z, \qquad z = \sum_q x_{[q]}, \quad x_{[q]} = (x_{q r + 1}, \dots, x_{q r + r})$$

The input is cut into shards of `r` entries, the last one filled up with zeros. Their sum is multiplied: the update is `D^T` beside itself,
`i / r` times. With `init="mini"` groups of `mini_r` outputs share `D` too. With `init="bat"` the update depends on the weight, both in
blocks of `r` by `r`:

$$\Delta W_{ab} = W_{ab} D_a + D_a$$

Identity at init: exact, since `D = 0`.

Paper: Kang, Yin, *MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure*, 2024, arXiv:2409.15371, whose first
version calls the methods Bone and Bat.

| tensor | shape | trained | init |
|---|---|---|---|
| `D` | `(r, o)`, or `(r, mini_r)` with `"mini"`, `(o / r, r, r)` with `"bat"` | yes | zeros |

Trained per target: `r o`, or `r mini_r`. Needs nothing of the weight but its output. `"bat"` reads the dense weight in each forward, and
builds an update of its size.

Departures: with `"bat"` dropout falls on the input of the update, where PEFT applies none.
"""

from collections.abc import Set
from dataclasses import InitVar, dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Probability, Rank, Size, add_low_rank, checked, expect, require_divisor


class MiSSParams(TypedDict):
    D: Float[Tensor, "..."]


def sum_of_shards(x: Tensor, r: int) -> Tensor:
    """Add up the shards of `r` consecutive entries: `(*b, i) -> (*b, r)`."""
    missing = -x.shape[-1] % r
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, r)).sum(-2)


def block_update(D: Tensor, weight: Tensor) -> Tensor:
    """Compute the update `(o, i)` of `"bat"`: `W_ab D_a + D_a` in blocks of `r` by `r`."""
    o, i = weight.shape
    n, r, _ = D.shape
    products = torch.bmm(weight.reshape(n, -1, r), D).view(n, r, i // r, r)  # the rows of each W_a, in pieces of r
    return (products + D[:, :, None]).view(o, i)


@checked
def miss(params: MiSSParams, W: Frozen, x: Float[Tensor, "*b i"], *, start: str = "default", dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + D^T z`, or the update of another form. The module's docstring has the formulas and the shapes."""
    D = params["D"]
    dropped = W.dropped(x, dropout)
    if start == "bat":
        update = block_update(D, W.dense(D.dtype))
        return W.updated(x, update) if dropped is x else add_low_rank(W(x), dropped, update)
    z = sum_of_shards(dropped, D.shape[0])
    y = W(x)
    if start == "default":
        return add_low_rank(y, z, D.t())
    group = F.linear(z, D.t()).to(y.dtype)  # (*b, mini_r); under autocast the layer's output has another dtype than its input
    return (y.unflatten(-1, (-1, D.shape[1])) + group.unsqueeze(-2)).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(AdapterConfig):
    """Config of MiSS.

    Args:
        r: width of a shard of the input, from 1 to `i`; with `init="bat"` a divisor of `i` and `o`.
        mini_r: width of a group of outputs with `init="mini"`, >= 1, a divisor of `o`.
        init, start: `"default"`, `"mini"` or `"bat"`; one option, kept as `start`, since `init` is the method.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "miss"
    trained = "r * (mini_r if start == 'mini' else o)"
    macs = "0 if start == 'bat' else r * (mini_r if start == 'mini' else o)"

    r: Rank = 64
    mini_r: Size = 1
    start: Literal["default", "mini", "bat"] = "default"
    dropout: Probability = 0.0
    init: InitVar[str]

    @property
    def uses(self) -> Set[str]:
        """The parts of a layer that the variant uses: the weight only for `init="bat"`."""
        return frozenset({"output", "vectors"} | ({"dense"} if self.start == "bat" else set()))

    def init(self, W: Frozen, generator: torch.Generator) -> MiSSParams:
        i, o, r = W.in_features, W.out_features, self.r
        expect(self, "r", r <= i, f"at most i = {i}", "Lower r or leave the layer out.")
        if self.start == "bat":
            require_divisor(self, "r", i, "i")
            require_divisor(self, "r", o, "o")
            return {"D": torch.zeros(o // r, r, r)}
        if self.start == "mini":
            require_divisor(self, "mini_r", o, "o")
            return {"D": torch.zeros(r, self.mini_r)}
        return {"D": torch.zeros(r, o)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return miss(params, W, x, start=self.start, dropout=self.dropout)
