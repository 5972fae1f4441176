r"""LoReFT: an edit of a block's output, within a subspace, at the first and last positions of the prompt.

$$h' = h + R^T (W h + b - R h), \qquad R R^T = I$$

`h` is the hidden state that a block passes on, and `R` the trained `R` with its rows made orthonormal. The first positions and the last
ones have an intervention each, or share one.

Identity at init: none with the paper's start, which draws `W` and `R` apart; with `start="identity"`, `W = R` and `b = 0`, exact in float32
and to the rounding of the params in bfloat16.

Paper: Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts, *ReFT: Representation Finetuning for Language Models*, 2024, arXiv:2404.03592,
eq. (2), positions sec. 4.1.

| tensor | shape | trained | init |
|---|---|---|---|
| `R` | `(n, r, d)` | yes | orthonormal rows |
| `W` | `(n, r, d)` | yes | uniform within 1/sqrt(d) |
| `b` | `(n, r)` | yes | uniform within 1/sqrt(d) |

`n` is 2 where first and last positions are edited apart, else 1. Trained per target: `n r (2 d + 1)`. Needs nothing of any weight. The
prompt of a row is the part that the attention mask keeps, up to the first label that counts. Tokens that `generate` adds are not edited.
Of a prompt with `m` tokens at most `m // 2` are first ones and as many last ones, as in the paper's code.

Departures: the paper's code parametrises `R` by Householder reflections, and here its rows are made orthonormal by a Cholesky factor: the
same set of matrices by other coordinates. There is no dropout; the paper's code drops entries of the whole output, hidden state included.
The update is evaluated as `((W - R) h + b) R`, two products instead of three.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Rank, checked, expect, full_precision, kaiming
from lora_lite.core.positions import edited

_POSITIONS = re.compile(r"(?:f([1-9]\d*))?\+?(?:l([1-9]\d*))?")


class LoReFTParams(TypedDict):
    R: Float[Tensor, "n r d"]
    W: Float[Tensor, "n r d"]
    b: Float[Tensor, "n r"]


def orthonormal(R: Tensor) -> Tensor:
    """Return the rows of `R (..., r, d)` made orthonormal, in at least float32. Rows of zeros, which edit nothing, stay zero.

    Of rows that depend on each other a GPU makes nan: a check would wait for it in each layer, and no CUDA graph could hold the call.

    Raises:
        torch.linalg.LinAlgError: on another device, for such rows.
    """
    wide = R.to(torch.promote_types(R.dtype, torch.float32))
    with full_precision(R):
        gram = wide @ wide.mT
        gram = gram + torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) == 0).to(gram.dtype))
        factor, failed = torch.linalg.cholesky_ex(gram, check_errors=not gram.is_cuda)
        factor = factor.masked_fill(failed[..., None, None] > 0, math.nan) if gram.is_cuda else factor
        return torch.linalg.solve_triangular(factor, wide, upper=False)


@checked
def loreft(
    params: LoReFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, first: int = 1, last: int = 1, prompt: Tensor | None = None
) -> Float[Tensor, "*b d"]:
    """Return `h = W x` edited at the first and last positions of its second-last axis. The module's docstring has the formula.

    With `prompt`, `(b, t)`, the positions are counted within each row's prompt. Of fewer than `first + last` positions, the first half
    and the last half are edited, the middle one of an odd number as a first one.
    """
    h = W(x)
    if h.dim() == 1:
        return loreft(params, W, x[None], first=first, last=last)[0]
    R = orthonormal(params["R"])
    M = (params["W"] - R).to(h.dtype)  # the values that the paper's W h - R h multiplies h by
    R, b, t = R.to(h.dtype), params["b"].to(h.dtype), h.shape[-2]
    head, tail = min(first, t if not last else (t + 1) // 2), min(last, t if not first else t // 2)

    def edit(h: Tensor, n: int) -> Tensor:
        return h + F.linear(h, M[n], b[n]) @ R[n]

    if prompt is not None:
        slots = max(first, last)
        return edited(lambda z: torch.cat([edit(z[:, :slots], 0), edit(z[:, slots:], -1)], dim=1), h, prompt, (first, last))
    return torch.cat([edit(h[..., :head, :], 0), h[..., head : t - tail, :], edit(h[..., t - tail :, :], -1)], dim=-2)


@dataclass(frozen=True, kw_only=True)
class LoReFTConfig(AdapterConfig):
    """Config of LoReFT.

    Args:
        r: rank of the subspace, from 1 to the width of the hidden states.
        positions: which positions of the prompt are edited, in the paper's words: `"f2+l3"` for the first two and the last three, `"l1"`.
        share_weights: whether first and last positions have one intervention.
        start: `"random"`, the paper's, or `"identity"`, the model as it is.
    """

    name = "loreft"
    adapts = "block"
    uses = frozenset({"output"})
    linear = False
    trained = "(2 if 'f' in positions and 'l' in positions and not share_weights else 1) * r * (2 * o + 1)"
    macs = "0"

    r: Rank = 4
    positions: str = "f1+l1"
    share_weights: bool = False
    start: Literal["random", "identity"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        found = _POSITIONS.fullmatch(self.positions)
        form = 'the numbers of first and last positions, as "f1+l1", "f4" or "l2"'
        expect(self, "positions", found is not None and any(found.groups()), form, "Name at least one position.")

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of the first and of the last positions that are edited."""
        first, last = _POSITIONS.fullmatch(self.positions).groups()  # type: ignore[union-attr]
        return int(first or 0), int(last or 0)

    @property
    def interventions(self) -> int:
        """Number of interventions: one, or one for each end."""
        return 2 if all(self.ends) and not self.share_weights else 1

    @property
    def identity(self) -> float | None:
        """Relative tolerance of the identity at init. In bfloat16 `W` and `R` are rounded apart."""
        return None if self.start == "random" else 5e-3

    def init(self, W: Frozen, generator: torch.Generator) -> LoReFTParams:
        n, d = self.interventions, W.out_features
        expect(self, "r", self.r <= d, f"at most {d}, the width of the hidden states", "Lower r.")
        R = orthonormal(torch.randn(n, self.r, d, generator=generator)).contiguous()  # as it is read from a file: W equals it to the bit
        if self.start == "identity":
            return {"R": R, "W": orthonormal(R), "b": torch.zeros(n, self.r)}
        bound = 1 / math.sqrt(d)
        b = torch.empty(n, self.r).uniform_(-bound, bound, generator=generator)
        return {"R": R, "W": kaiming(n * self.r, d, generator).view(n, self.r, d), "b": b}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        first, last = self.ends
        return loreft(params, W, x, first=first, last=last, prompt=W.prompt)

    def steer(self, params: Params, c: float | Tensor) -> Params:
        R = orthonormal(params["R"]).to(params["W"].dtype)
        return {**params, "W": R + c * (params["W"] - R), "b": c * params["b"]}
