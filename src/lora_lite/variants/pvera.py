r"""PVeRA: VeRA whose inner vector is drawn, while training, from a distribution that depends on the input.

$$y = W x + b + \lambda_b \odot B_o z, \qquad z = \mu + \epsilon \odot e^{\nu / 2}, \quad \epsilon \sim \mathcal{N}(0, 1), \qquad
\begin{pmatrix} \mu \\ \nu \end{pmatrix} = \lambda_d \odot (A_i\, \mathrm{drop}(x))$$

In evaluation mode `z` is its mean, `mu`: the lower halves of `A` and `lambda_d`, which say the variance, have no part.

`A` and `B` are drawn once for the whole model, as wide as its widest target, and stand once in the constants, under `pvera`.

Identity at init: exact, in training mode too, since `lambda_b = 0`.

Paper: Fillioux, Ferrante, Cournède, Vakalopoulou, Christodoulidis, *PVeRA: Probabilistic Vector-Based Random Matrix Adaptation*, 2025,
arXiv:2512.07703.

| tensor | shape | trained | init |
|---|---|---|---|
| `lambda_d` | `(2r,)` | yes | `d_initial` |
| `lambda_b` | `(o,)` | yes | zeros |
| `A` | `(2r, i_max)` | no, shared | uniform within sqrt(6 / i_max) |
| `B` | `(o_max, r)` | no, shared | uniform within sqrt(6 / r) |

Trained per target: `2r + o`. Needs nothing of the weight but its output.

Departures: PEFT multiplies by both halves of `A` in evaluation mode too, where the lower one has no part. Its `sample_at_inference` is
the mode here: `adapt.train()` draws, `adapt.eval()` takes the mean, which is what merges. The noise comes from PyTorch's generator, as
that of dropout does, where PEFT has a `generator_seed`. A layer that is adapted as a matrix, such as a convolution in
groups or a weight that the model reads, takes the mean in both modes: it has no input to draw for.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import Frozen, Params, checked
from lora_lite.variants.vera import VeRAConfig, of_widths, projections


class PVeRAParams(TypedDict):
    lambda_d: Float[Tensor, " two_r"]
    lambda_b: Float[Tensor, " o"]


@checked
def pvera(params: PVeRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, seed: int = 0, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + lambda_b (B_o z)`. A plain weight takes projections of its own widths, drawn from `seed`."""
    d, b = params["lambda_d"], params["lambda_b"]
    r = len(d) // 2
    shared = W.constants or projections([W], r, seed, parts=2)
    rows = 2 * r if W.training else r
    A, B = of_widths(shared["A"][:rows], shared["B"], W, x.dtype)
    z = d[:rows] * F.linear(W.dropped(x, dropout), A)
    if W.training:
        mean, log_variance = z.chunk(2, dim=-1)
        z = torch.addcmul(mean, torch.randn_like(mean), (0.5 * log_variance).exp())
    y = W(x)
    return torch.addcmul(y, b.to(y.dtype), F.linear(z, B).to(y.dtype))  # under autocast the layer's output has another dtype than its input


@dataclass(frozen=True, kw_only=True)
class PVeRAConfig(VeRAConfig):
    """Config of PVeRA: the fields of VeRA's."""

    name = "pvera"
    parts = 2
    trained = "2 * r + o"

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return pvera(params, W, x, seed=self.seed, dropout=self.dropout)
