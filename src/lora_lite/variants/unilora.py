r"""Uni-LoRA: LoRA whose factors, of all layers, are made of the entries of one trained vector.

$$y = W x + b + B A\, \mathrm{drop}(x), \qquad A_{kl} = \theta_j / \sqrt{n_j}, \quad j = \mathrm{index}(k, l)$$

and the same for `B`. Each entry of a factor of any layer is one entry of `theta`, drawn once. All entries of `theta` are used equally
often, up to one time, and `n_j` counts the uses: the map from `theta` to all factors keeps lengths.

Identity at init: exact. The factors `A` draw from the first half of `theta`, and the factors `B` from the second, which starts at zero.
With `start="random"`, the paper's and PEFT's, both draw from all of `theta`, which starts at random, and there is none.

Paper: Li, Han, Su, Li, Cai, Ji, *Uni-LoRA: One Vector is All You Need*, 2025, arXiv:2506.00799, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `theta_d` | `(d,)` | yes, shared | uniform within `init_theta_d_bound`, the second half zeros |
| `index_A`, `index_B` | `(r, i)`, `(o, r)` | no | drawn from `seed` for all layers together |
| `scale_A`, `scale_B` | `(r, i)`, `(o, r)` | no | `1 / sqrt(n)` of each entry's index |

Trained per target: none of its own, and `d` numbers for the whole model. Needs nothing of the weight but its output.

Departures: the start at the base model, which keeps the form and the cost, and lengths within each half; strength then scales the second
half. With `start="random"` strength scales all of `theta`, and the update grows with its square. The paper draws each entry's index by
itself; equal use is PEFT's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, Params, Positive, Probability, Rank, checked
from lora_lite.core.fields import Within

Start = Literal["zero", "random"]


class UniLoRAParams(TypedDict):
    theta_d: Float[Tensor, " d"]


def balanced(count: int, d: int, seed: int) -> Tensor:
    """Draw `count` indices below `d`, all equally often up to one time, as PEFT does from the same seed by the same generator."""
    generator = np.random.default_rng(seed)
    rest = generator.choice(d, size=count % d, replace=False) if count % d else np.empty(0, dtype=np.int64)
    indices = np.concatenate([np.repeat(np.arange(d), count // d), rest])
    generator.shuffle(indices)
    return torch.as_tensor(indices)


def assigned(layers: Sequence[Frozen], r: int, d: int, seed: int, start: Start) -> list[Constants]:
    """Return each layer's indices and scales. PEFT's order is that of the layers, `A` before `B`, row by row."""
    sizes = [(r * W.in_features, W.out_features * r) for W in layers]
    if start == "random":
        flat = balanced(sum(map(sum, sizes)), d, seed).split([n for pair in sizes for n in pair])
        parts = list(zip(flat[::2], flat[1::2]))
    else:
        of_A, of_B = (list(n) for n in zip(*sizes))
        half = d // 2
        parts = list(zip(balanced(sum(of_A), half, seed).split(of_A), (half + balanced(sum(of_B), d - half, seed + 1)).split(of_B)))
    uses = torch.zeros(d, dtype=torch.int64)
    for part in (part for pair in parts for part in pair):
        uses += part.bincount(minlength=d)
    scales = uses.clamp_min(1).float().rsqrt()
    found = []
    for W, (a, b) in zip(layers, parts):
        index = {"A": a.view(r, -1), "B": b.view(-1, r)}
        both = {**{f"index_{f}": j.int() for f, j in index.items()}, **{f"scale_{f}": scales[j] for f, j in index.items()}}
        found.append({name: c.to(W.device) for name, c in both.items()})
    return found


@checked
def unilora(
    params: UniLoRAParams,
    W: Frozen,
    x: Float[Tensor, "*b i"],
    *,
    r: int = 4,
    seed: int = 42,
    start: Start = "zero",
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + B A drop(x)`. A plain weight takes the indices of a model that has no other layer, drawn from `seed`."""
    theta = params["theta_d"]
    fixed = W.constants or assigned([W], r, len(theta), seed, start)[0]
    A, B = (
        theta.index_select(0, index.flatten()).view(index.shape) * scale.to(theta.dtype)
        for index, scale in ((fixed["index_A"], fixed["scale_A"]), (fixed["index_B"], fixed["scale_B"]))
    )
    return W.updated_low_rank(x, (A, B), dropout=dropout)


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(AdapterConfig):
    """Config of Uni-LoRA.

    Args:
        r: rank of the update, >= 1.
        theta_d_length: length of the trained vector, `d`, >= 2.
        seed: of the indices; PEFT's `proj_seed`.
        start: `"zero"` for the base model, `"random"` for the paper's start.
        init_theta_d_bound: bound of the uniform start, > 0.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "unilora"
    uses = frozenset({"output", "project"})
    trained = "0"
    macs = "r * (i + o)"

    r: Rank = 4
    theta_d_length: Annotated[int, Within(2)] = 256
    seed: Count = 42
    start: Start = "zero"
    init_theta_d_bound: Positive = 0.02
    dropout: Probability = 0.0

    @property
    def identity(self) -> float | None:
        """Exact with the start at zero."""
        return 0.0 if self.start == "zero" else None

    def allot(self, layers: Mapping[str, Frozen]) -> Mapping[str, Constants]:
        return dict(zip(layers, assigned(list(layers.values()), self.r, self.theta_d_length, self.seed, self.start)))

    def share_init(self, layers: Sequence[Frozen], generator: torch.Generator) -> UniLoRAParams:
        bound, theta = self.init_theta_d_bound, torch.zeros(self.theta_d_length)
        (theta[: len(theta) // 2] if self.start == "zero" else theta).uniform_(-bound, bound, generator=generator)
        return {"theta_d": theta}

    def init(self, W: Frozen, generator: torch.Generator) -> Params:
        return {}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return unilora(params, W, x, r=self.r, seed=self.seed, start=self.start, dropout=self.dropout)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        if self.start == "random" or not params:
            return super().steer(params, c)
        first, second = params["theta_d"].split([self.theta_d_length // 2, self.theta_d_length - self.theta_d_length // 2])
        return {"theta_d": torch.cat([first, c * second])}
