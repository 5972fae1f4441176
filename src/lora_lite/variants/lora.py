r"""LoRA: a low-rank update beside a frozen weight.

$$y = W x + b + s\, B (A\, \mathrm{drop}(x)), \qquad s = \alpha / r \ \text{ or, rank-stabilised, } \ \alpha / \sqrt{r}$$

With `lora_bias` a trained `s b` is added to every output, with `bias` a trained `db`, as BitFit's: PEFT's `bias="lora_only"` trains the
layer's own bias so. Both merge into the layer's bias, where there is one.

Identity at init: exact, since `B = 0` (at an embedding `A = 0`). With `start="orthogonal"` to rounding, 1e-6 in
float32 and 1e-3 in bfloat16: both factors are drawn, in complementary halves of one random rotation, so that `B A = 0`.

Paper: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large Language Models*, 2021,
arXiv:2106.09685, eq. (3). Rank-stabilised scale: Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with
LoRA*, 2023, arXiv:2312.03732.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(r, i)` | yes | uniform within 1/sqrt(i) |
| `B` | `(o, r)` | yes | zeros |
| `b` | `(o,)` | with `lora_bias` | zeros |
| `db` | `(o,)` | with `bias` | zeros |

On an embedding `A` starts at zero and `B` is Gaussian, as in PEFT, whatever the start elsewhere.

Trained per target: `r (i + o)`, with `lora_bias` or `bias` `o` more. Needs nothing of the weight but its output.

Departures: the paper's text draws `A` from a Gaussian; its code and PEFT draw it uniformly, and so does this. `start="gaussian"` is PEFT's
Gaussian, of standard deviation `1 / r`; `"orthogonal"` is PEFT's start of that name. `alpha` defaults to 16, twice PEFT's.
Dropout falls on the adapter's input only, never on the base path, and acts in training mode.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, NonNegative, Params, Probability, Rank, checked, expect


class LoRAParams(TypedDict):
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    b: NotRequired[Float[Tensor, " o"]]
    db: NotRequired[Float[Tensor, " o"]]


@checked
def lora(params: LoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale (B A drop(x) + b) + db`, the second `b` of the params. The module's docstring has the shapes."""
    y = W.updated_low_rank(x, (params["A"], params["B"]), scale, dropout)
    if "b" in params:
        y = torch.add(y, params["b"].to(y.dtype), alpha=scale)
    return y + params["db"].to(y.dtype) if "db" in params else y


def gaussian(r: int, i: int, o: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `A` with standard deviation `1 / r`; `B` is zero."""
    return torch.randn(r, i, generator=generator) / r, torch.zeros(o, r)


def orthogonal(r: int, i: int, o: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw both factors, Gaussian in the halves of a random rotation: `A = Q_even^T G1 / 10`, `B = G2 Q_odd / 10`, so that `B A = 0`."""
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, r), (r // 2, i), (o, r // 2)))
    rotation, right, left = drawn  # in float64, so that the product is zero to the rounding of the factors alone
    Q = torch.linalg.qr(rotation).Q
    return (Q[0::2].t() @ right / 10).float(), (left @ Q[1::2] / 10).float()


STARTS = {"kaiming": None, "gaussian": gaussian, "orthogonal": orthogonal}


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """The fields that LoRA and the methods that start it elsewhere have in common.

    Args:
        r: rank of the update, >= 1.
        alpha: numerator of the scale, dimensionless, >= 0.
        rslora: divide `alpha` by `sqrt(r)` instead of `r`.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    uses = frozenset({"output", "project"})
    steered: ClassVar[tuple[str, ...] | None] = ("B",)  # the update is linear in B; scaling A too would square the strength
    trained = "r * (i + o)"
    macs = "r * (i + o)"

    r: Rank = 8
    alpha: NonNegative = 16.0
    rslora: bool = False
    dropout: Probability = 0.0

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / r` or `alpha / sqrt(r)`."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def init(self, W: Frozen, generator: torch.Generator) -> LoRAParams:
        A, B = W.low_rank_start(self.r, generator)
        return {"A": A, "B": B}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return lora(params, W, x, scale=self.scale, dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(LowRankConfig):
    """Config of LoRA.

    Args:
        r: rank of the update, >= 1; even with `start="orthogonal"`.
        alpha: numerator of the scale, dimensionless, >= 0.
        rslora: divide `alpha` by `sqrt(r)` instead of `r`.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
        start: how `A` is drawn: `"kaiming"` uniformly within 1/sqrt(i), `"gaussian"`, or `"orthogonal"`, which draws `B` too.
        lora_bias: train a bias of the update.
        bias: train the layer's own bias too, as its displacement.
    """

    name = "lora"
    steered = ("B", "b", "db")
    trained = "r * (i + o) + (lora_bias + bias) * o"

    start: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    lora_bias: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "r", self.start != "orthogonal" or self.r % 2 == 0, 'even with start="orthogonal"', "Use an even rank.")

    @property
    def identity(self) -> float:
        """The output's relative error at init. Factors whose product is zero are rounded, at the worst to bfloat16."""
        return min(1e-3 * self.scale * math.sqrt(self.r), 0.5) if self.start == "orthogonal" else 0.0

    def init(self, W: Frozen, generator: torch.Generator) -> LoRAParams:
        A, B = W.low_rank_start(self.r, generator, STARTS[self.start])
        shifts = [name for name, on in (("b", self.lora_bias), ("db", self.bias)) if on]
        return {"A": A, "B": B, **{name: torch.zeros(W.out_features) for name in shifts}}  # type: ignore[typeddict-item]
