r"""LoKr: an update that is the Kronecker product of a small matrix and a larger, often low-rank one.

$$y = W x + b + s\, (w_1 \otimes w_2)\, x, \qquad s = \alpha / r, \qquad o = o_1 o_2, \quad i = i_1 i_2$$

The product is never formed. With `x` as a matrix `X (i1, i2)` the update is `w1 X w2^T (o1, o2)`, taken in the cheaper of its two orders; a
factored matrix acts by its factors where those have fewer entries.

Identity at init: exact, since `w1 = 0` (`w1_a = 0` where it is factored; with `start="lycoris"` it is `w2` or `w2_b`).

Paper: Yeh, Hsieh, Gao, Yang, Oh, Gong, *Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation*, 2023,
arXiv:2309.14859, sec. 3. Kronecker adapters: Edalati, Tahaei, Kobyzev, Nia, Clark, Rezagholizadeh, *KronA: Parameter Efficient Tuning with
Kronecker Adapter*, 2022, arXiv:2212.10650.

| tensor | shape | trained | init |
|---|---|---|---|
| `w1` | `(o1, i1)` | yes | zeros |
| or `w1_a`, `w1_b` | `(o1, r)`, `(r, i1)` | yes | zeros; uniform within 1/sqrt(i1) |
| `w2` | `(o2, i2)` | yes | uniform within 1/sqrt(i2) |
| or `w2_a`, `w2_b` | `(o2, r)`, `(r, i2)` | yes | uniform within 1/sqrt(r), 1/sqrt(i2) |

`w2` is factored where `2 r < max(o2, i2)`, and with `decompose_both` so is `w1` where `2 r < max(o1, i1)`. A width `n` is divided into
`(m, n / m)` by its largest divisor `m` up to `sqrt(n)`, with `decompose_factor` also up to that; if that divides `n` it is `m` itself.

Trained per target: the entries of `w1` and `w2`, or of their factors. Needs nothing of the weight but its output.

Departures: none from PEFT, but for convolutions, which are adapted as the matrix of their patches. `s` is `alpha / r` even where nothing is
factored; LyCORIS takes 1 there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, NonNegative, Params, Probability, Rank, Size, checked, kaiming, recomputed
from lora_lite.variants._dropout import kept


class LoKrParams(TypedDict):
    w1: NotRequired[Float[Tensor, "o1 i1"]]
    w1_a: NotRequired[Float[Tensor, "o1 r"]]
    w1_b: NotRequired[Float[Tensor, "r i1"]]
    w2: NotRequired[Float[Tensor, "o2 i2"]]
    w2_a: NotRequired[Float[Tensor, "o2 r"]]
    w2_b: NotRequired[Float[Tensor, "r i2"]]


def divided(n: int, factor: int) -> tuple[int, int]:
    """Divide a width into two factors: `factor` and the rest, or else the most balanced pair whose smaller one is at most `factor`."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    bound = math.isqrt(n) if factor < 0 else min(factor, math.isqrt(n))
    m = next(m for m in range(bound, 0, -1) if n % m == 0)
    return m, n // m


def steps(params: Any, name: str) -> list[Tensor]:
    """Return the matrices of a factor in the order in which they act: the one, or its two factors where they have fewer entries."""
    if name in params:
        return [params[name]]
    a, b = params[f"{name}_a"], params[f"{name}_b"]
    return [b, a] if a.numel() + b.numel() < len(a) * b.shape[1] else [a @ b]


def on_rows(m: Tensor, h: Tensor) -> Tensor:
    """Return `m h`, `(o, i)` by `(n, i, k)`. A batched product needs no transpose, but its gradient is as large as `m` for each of `n`."""
    if m.numel() > h.shape[1] * h.shape[2]:
        return F.linear(h.mT, m).mT
    return torch.bmm(m.expand(len(h), *m.shape), h)


def on_columns(m: Tensor, h: Tensor) -> Tensor:
    """Return `h m^T`, `(n, k, i)` by `(o, i)`."""
    return F.linear(h, m)


def kronecker(left: Sequence[Tensor], right: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return `(w1 kron w2) x` of matrices given as their steps, in the cheaper order: `(*b, i) -> (*b, o)`."""
    (o1, i1), (o2, i2) = ((len(side[-1]), side[0].shape[1]) for side in (left, right))
    c1, c2 = (sum(m.numel() for m in side) for side in (left, right))
    h = x.reshape(-1, i1, i2)
    order = [(on_columns, right), (on_rows, left)]
    for product, side in order if i1 * c2 + o2 * c1 <= i2 * c1 + o1 * c2 else reversed(order):
        for m in side:
            h = product(m, h)
    return h.reshape(*x.shape[:-1], o1 * o2)


@checked
def lokr(
    params: LoKrParams,
    W: Frozen,
    x: Float[Tensor, "*b i"],
    *,
    scale: float,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    rank_dropout_scale: bool = False,
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale (w1 kron w2) x`. The module's docstring has the formula and the shapes."""
    left, right = steps(params, "w1"), steps(params, "w2")
    left[-1] = scale * left[-1]  # the smallest thing to scale
    y0 = W(x)
    delta = recomputed(lambda x, *factors: kronecker(factors[: len(left)], factors[len(left) :], x), x, *left, *right)
    stays = kept(W, delta, rank_dropout, module_dropout, rank_dropout_scale)
    return y0 + delta if stays is None else torch.addcmul(y0, delta, stays)


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(AdapterConfig):
    """Config of LoKr.

    Args:
        r: rank of what is factored, >= 1; the scale is `alpha / r` in any case.
        alpha: numerator of the scale, dimensionless, >= 0.
        decompose_both: factor `w1` too, where `2 r` is below its larger side.
        decompose_factor: first factor of the layer's widths, or a bound of it where it does not divide them; -1 for the most balanced ones.
        start: `"zeros"` for a `w1` of zeros, as in PEFT, `"lycoris"` for a `w2` of zeros.
        rank_dropout: probability of dropping an output of the update, in [0, 1), drawn once a call in training mode.
        module_dropout: probability of dropping the update of the layer, in [0, 1), drawn once a call in training mode.
        rank_dropout_scale: divide by the share of outputs that stay.
    """

    name = "lokr"
    uses = frozenset({"output", "vectors"})
    steered = ("w1", "w1_a")  # the update is linear in each factor
    trained = "w1 + w2"
    macs = "min(i1 * c2 + o2 * c1, i2 * c1 + o1 * c2)"

    r: Rank = 8
    alpha: NonNegative = 8.0
    decompose_both: bool = False
    decompose_factor: Literal[-1] | Size = -1
    start: Literal["zeros", "lycoris"] = "zeros"
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    rank_dropout_scale: bool = False

    def _shapes(self, i: int, o: int) -> dict[str, dict[str, tuple[int, int]]]:
        """Return the shapes of both matrices, or of their factors, by name."""
        divisions = zip(divided(o, self.decompose_factor), divided(i, self.decompose_factor))
        found = {}
        for (rows, cols), name, may in zip(divisions, ("w1", "w2"), (self.decompose_both, True)):
            factored = {f"{name}_a": (rows, self.r), f"{name}_b": (self.r, cols)}
            found[name] = factored if may and 2 * self.r < max(rows, cols) else {name: (rows, cols)}
        return found

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the factors of the widths, the trained entries of both matrices, and the multiply-adds of a product with each."""
        (i1, i2), (o1, o2) = divided(i, self.decompose_factor), divided(o, self.decompose_factor)
        w1, w2 = (sum(a * b for a, b in shapes.values()) for shapes in self._shapes(i, o).values())
        return {"i1": i1, "i2": i2, "o1": o1, "o2": o2, "w1": w1, "w2": w2, "c1": min(w1, o1 * i1), "c2": min(w2, o2 * i2)}

    def init(self, W: Frozen, generator: torch.Generator) -> LoKrParams:
        zero = ("w1", "w1_a") if self.start == "zeros" else ("w2", "w2_b")
        w1, w2 = self._shapes(W.in_features, W.out_features).values()
        made = {name: torch.zeros(shape) if name in zero else kaiming(*shape, generator) for name, shape in {**w1, **w2}.items()}
        return made  # type: ignore[return-value]

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        drops = {"rank_dropout": self.rank_dropout, "module_dropout": self.module_dropout, "rank_dropout_scale": self.rank_dropout_scale}
        return lokr(params, W, x, scale=self.alpha / self.r, **drops)
