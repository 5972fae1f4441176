r"""RandLoRA: a full-rank update from random bases that all layers share, each with trained scales.

$$y = W x + b + s \sum_{j=1}^{n} B_j \Lambda_j A\, \Gamma_j\, \mathrm{drop}(x), \qquad s = \alpha / r$$

There are `n = ceil(min(i, o) / r)` bases, so that the sum has full rank. `Lambda_j` and `Gamma_j` are diagonal; all are trained. `A` and
`B` are drawn once for the whole model, as large as its largest target, and stand once in the constants, under `randlora`. `A` runs along
the smaller width of a layer: where that is the output, the sum is transposed.

Identity at init: exact, since `Lambda = 0`.

Paper: Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad, *RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of
Large Models*, 2025, arXiv:2502.00987.

| tensor | shape | trained | init |
|---|---|---|---|
| `Lambda` | `(r, n)` | yes | zeros |
| `Gamma` | `(n, min(i, o))` | yes | `1 / max(n, min(i, o))` |
| `A` | `(r, 1, min(i_max, o_max))` | no, shared | random, of unit deviation |
| `B` | `(max(i_max, o_max), n_max, r)` | no, shared | random, of unit deviation |

Trained per target: `n (r + min(i, o))`. Needs nothing of the weight but its output. The bases' products are never formed.

Departures: the products are paired as in PEFT, whose `A` is flattened by ranks first and `B` by bases first: column `p n + q` of `B` meets
row `(p, q)` of `A`, not that of the same basis. Both are random, and the files agree. The neutral value of `Gamma` is not zero, but the
zero tree is the base model, and strength scales `Lambda` alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, NonNegative, Params, Probability, Rank, add_low_rank, checked


class RandLoRAParams(TypedDict):
    Lambda: Float[Tensor, "r n"]
    Gamma: Float[Tensor, "n k"]


def bases(layers: Sequence[Frozen], r: int, seed: int, density: float | None = None) -> Constants:
    """Draw `A (r, 1, k)` and then `B (m, n, r)` as PEFT does from the same seed.

    `k` and `m` are the smaller and the larger of the widest input and the widest output.

    Args:
        layers: those that share the bases.
        r: the rank of each basis.
        seed: of the draws.
        density: share of entries that are 1 or -1, the others 0; None for uniform entries.
    """
    widest = max(W.in_features for W in layers), max(W.out_features for W in layers)
    small, large = min(widest), max(widest)
    generator = torch.Generator().manual_seed(seed)
    shapes = (r, 1, small), (large, -(-small // r), r)
    A, B = (ternary(shape, density, generator) if density else uniform(shape, generator) for shape in shapes)
    deviations = [t.std() if t.numel() > 1 else t.new_zeros(()) for t in (A, B)]
    if not all(deviations):
        raise ValueError(
            f"RandLoRAConfig.r: expected bases whose entries differ, since they are divided by their deviation, found them alike with "
            f"r={r} for layers of at most {widest[0]} inputs and {widest[1]} outputs. Raise r, or draw others by seed."
        )
    return {"A": (A / deviations[0]).float(), "B": (B / deviations[1]).float()}


def uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Draw uniform entries in bfloat16, as PEFT does, one slice of the middle axis after another."""
    draw = [torch.empty(shape[0], 1, shape[2], dtype=torch.bfloat16, device=generator.device) for _ in range(shape[1])]
    return torch.cat([nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator) for part in draw], dim=1)


def ternary(shape: tuple[int, int, int], density: float, generator: torch.Generator) -> Tensor:
    """Draw entries of which half of `density` are -1 and half are 1."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)
    return (drawn > 1 - density / 2).float() - (drawn < density / 2).float()


@checked
def randlora(
    params: RandLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float, seed: int = 0, dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale sum_j B_j Lambda_j A Gamma_j x`. A plain weight takes bases of its own widths, drawn from `seed`."""
    L, G = params["Lambda"], params["Gamma"]
    (r, n), k = L.shape, G.shape[1]
    shared, y = W.constants or bases([W], r, seed), W(x)  # the layer first: the backward pass is then through with the factors before it
    A = shared["A"][..., :k].to(x.dtype)
    B = shared["B"][: max(W.in_features, W.out_features), :n].to(x.dtype).flatten(1)  # (m, n r)
    A = (A * (L[..., None] * G)).flatten(0, 1)  # (r n, k); the frozen factor last, so that its product with the others is not kept
    right, left = (A, B) if k == W.in_features else (B.t(), A.t())
    return add_low_rank(y, W.project(x, right, dropout), left, scale)


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(AdapterConfig):
    """Config of RandLoRA.

    Args:
        r: rank of each basis, >= 1; the smaller, the more bases and trained numbers.
        alpha: numerator of the scale `alpha / r`, dimensionless, >= 0; PEFT's default of 20 times the rank may ask for a low learning rate.
        seed: of the shared bases; PEFT's `projection_prng_key`.
        sparse: draw entries of -1, 0 and 1, a third of them not zero.
        very_sparse: as `sparse`, with a share of 1 / sqrt(min(i_max, o_max)) not zero; it takes precedence.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "randlora"
    uses = frozenset({"output", "vectors"})
    steered = ("Lambda",)
    trained = "-(-min(i, o) // r) * (r + min(i, o))"
    macs = "-(-min(i, o) // r) * r * (i + o)"

    r: Rank = 32
    alpha: NonNegative = 640.0
    seed: Count = 0
    sparse: bool = False
    very_sparse: bool = False
    dropout: Probability = 0.0

    def share(self, layers: Sequence[Frozen]) -> Constants:
        small = min(max(W.in_features for W in layers), max(W.out_features for W in layers))
        density = 1 / math.sqrt(small) if self.very_sparse else 1 / 3 if self.sparse else None
        return bases(layers, self.r, self.seed, density)

    def init(self, W: Frozen, generator: torch.Generator) -> RandLoRAParams:
        k = min(W.in_features, W.out_features)
        n = -(-k // self.r)
        return {"Lambda": torch.zeros(self.r, n), "Gamma": torch.full((n, k), 1 / max(n, k))}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return randlora(params, W, x, scale=self.alpha / self.r, seed=self.seed, dropout=self.dropout)
