r"""WaveFT: an update with few coefficients in the domain of Haar's wavelets.

$$y = W x + b + \alpha\, H^{-1}(C)\, x$$

`C` holds `c` at random places and `H^{-1}` is the inverse of one level of the two-dimensional Haar transform. The quadrants of `C` are
averages, differences of rows, differences of columns, and both. So a coefficient adds `c / 2` to two by two neighbouring entries of the
weight, with a sign for each:

$$\begin{pmatrix} + & + \\ + & + \end{pmatrix}, \quad \begin{pmatrix} + & + \\ - & - \end{pmatrix}, \quad
\begin{pmatrix} + & - \\ + & - \end{pmatrix}, \quad \begin{pmatrix} + & - \\ - & + \end{pmatrix}$$

No transform is computed. Odd widths are filled up to even ones, and what falls outside the weight is cut off. With `use_idwt=False`
the coefficients themselves are the update, `alpha C`.

Identity at init: exact, since `c = 0`.

Paper: Bilican, Yılmaz, Tekalp, Cinbiş, *Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets*, 2025, arXiv:2505.12532.

| tensor | shape | trained | init |
|---|---|---|---|
| `c` | `(n_frequency,)` | yes | zeros |
| `places` | `(n_frequency,)` | no | random places `u i + v`, of `seed` |

Trained per target: `n_frequency`. Needs nothing of the weight but its output. Where a weight has more than 512 entries for each updated
one, inputs are gathered and outputs scattered. Elsewhere the update is built in each forward, a matrix of the weight's size.

Departures: PEFT takes longer wavelets too, whose filters are tables of numbers; here is its default, `db1`.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, NonNegative, Params, Size, checked
from lora_lite.variants._sparse import DENSE, drawn_places, places_of, plus_sparse


class WaveFTParams(TypedDict):
    c: Float[Tensor, " n"]


def haar(c: Tensor, at: Tensor, o: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and values `(4 n,)` of the entries that coefficients `c (n,)` at the places `at` add up to."""
    u, v = at // i, at % i
    height, width = (o + 1) // 2, (i + 1) // 2  # of a quadrant
    lower, right = u >= height, v >= width
    corner = torch.arange(4, device=at.device)[:, None]
    below, beside = corner // 2, corner % 2  # of each corner in its two by two entries
    rows, cols = 2 * (u - height * lower) + below, 2 * (v - width * right) + beside
    negative = (right & (below == 1)) ^ (lower & (beside == 1))
    sign = torch.where(negative, -0.5, 0.5) * ((rows < o) & (cols < i))
    return rows.clamp(max=o - 1).flatten(), cols.clamp(max=i - 1).flatten(), (c * sign.to(c.dtype)).flatten()


@checked
def waveft(
    params: WaveFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, scaling: float = 25.0, use_idwt: bool = True, seed: int = 777
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scaling H^{-1}(C) x`, or `scaling C x` without `use_idwt`. A plain weight takes places drawn from `seed`."""
    c, at, i = scaling * params["c"], places_of(W, len(params["c"]), seed), W.in_features
    rows, cols, values = haar(c, at, W.out_features, i) if use_idwt else (at // i, at % i, c)
    return plus_sparse(W, x, rows, cols, values)


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(AdapterConfig):
    """Config of WaveFT.

    Args:
        n_frequency: number of trained coefficients, from 1 to `i o`.
        scaling: factor `alpha` of the update, dimensionless, >= 0.
        use_idwt: take the inverse transform of the coefficients, rather than the coefficients themselves.
        seed: of the places, the same for all layers; PEFT's `random_loc_seed`.
    """

    name = "waveft"
    uses = frozenset({"output", "vectors"})
    trained = "n_frequency"
    # The dense form is paid for once a call.
    macs = f"0 if i * o <= {DENSE} * (4 if use_idwt else 1) * n_frequency else (4 if use_idwt else 1) * n_frequency"

    n_frequency: Size = 2592
    scaling: NonNegative = 25.0
    use_idwt: bool = True
    seed: Count = 777

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        return drawn_places(self, W)

    def init(self, W: Frozen, generator: torch.Generator) -> WaveFTParams:
        return {"c": torch.zeros(self.n_frequency)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return waveft(params, W, x, scaling=self.scaling, use_idwt=self.use_idwt, seed=self.seed)
