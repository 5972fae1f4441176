r"""FourierFT: an update with few coefficients in the Fourier domain.

$$y = W x + b + \Delta x, \qquad \Delta_{k l} = \frac{\alpha}{i\, o} \sum_{q} c_q \cos 2 \pi ( u_q k / o + v_q l / i )$$

`Delta` is `alpha` times the real part of the inverse transform of a spectrum with `c` at the places `(u, v)`. For as many input vectors as
the layer is wide it is built so, and built again in the backward pass. For fewer it is not built: the cosine of the sum is
`cos cos - sin sin`, so the input is transformed once, its coefficients are mixed, and the result is transformed back: real parts with real,
imaginary with imaginary. That mix is two products of half the widths. Where the weight has more than 512 entries for each coefficient, it
gathers single ones, and `Delta` is never built.

Identity at init: exact, since `c = 0`; not with `init="normal"`, PEFT's default.

Paper: Gao, Wang, Chen, Liu, Wu, Chen, Li, *Parameter-Efficient Fine-Tuning with Discrete Fourier Transform*, 2024, arXiv:2405.03003,
eq. (2)-(4).

| tensor | shape | trained | init |
|---|---|---|---|
| `c` | `(n_frequency,)` | yes | zeros |
| `places` | `(n_frequency,)` | no | random places `u i + v`, of `seed` |

Trained per target: `n_frequency`. Needs nothing of the weight but its output. The transforms, of `i` and `o` numbers a token, come on top
of the multiply-adds.

Departures: it starts at the base model, where the paper and PEFT start from Gaussian coefficients. Transforms run in at least float32.
"""

from dataclasses import InitVar, dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, NonNegative, Params, Size, checked, full_precision
from lora_lite.variants._sparse import drawn_places, is_dense, places_of

FEW = 16
"""Number of input vectors up to which each is transformed, however narrow the layer."""


class FourierFTParams(TypedDict):
    c: Float[Tensor, " n"]


def folded(c: Tensor, at: Tensor, o: int, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, columns and the coefficients of the real and the imaginary parts, in the half of the spectrum that real transforms have.

    The coefficient of a frequency stands for its negative too, so it counts half, but in rows 0 and `o / 2`, which are their own negatives.
    """
    u, v = at // i, at % i
    rows, cols = torch.minimum(u, o - u), torch.minimum(v, i - v)
    alone = (rows == 0) | (2 * rows == o)
    even = c * torch.where(alone, 1.0, 0.5)
    return rows, cols, even, even * torch.where((u == rows) == (v == cols), -1.0, 1.0)


def transformed(c: Tensor, at: Tensor, x: Tensor, W: Frozen) -> Tensor:
    """Compute `o sum_q c_q cos(...) x`, the update without its scale, in at least float32: `(*b, i) -> (*b, o)`."""
    o, i = W.out_features, W.in_features
    spectrum = torch.fft.rfft(x)  # (*b, i // 2 + 1); the sines of x are the negative imaginary parts
    rows, cols, even, odd = folded(c, at, o, i)
    if is_dense(len(at), W):
        size = (o // 2 + 1, i // 2 + 1)
        empty, flat = c.new_zeros(size[0] * size[1]), rows.long() * size[1] + cols
        cosines, sines = (empty.index_add(0, flat, values).view(size) for values in (even, odd))
        mixed = torch.complex(F.linear(spectrum.real, cosines), F.linear(spectrum.imag, sines))
    else:
        terms = torch.view_as_real(spectrum).index_select(-2, cols) * torch.stack([even, odd], -1)
        mixed = torch.view_as_complex(x.new_zeros(*x.shape[:-1], o // 2 + 1, 2).index_add(-2, rows, terms))
    return torch.fft.irfft(mixed, n=o)


def dense_update(c: Tensor, at: Tensor, o: int, i: int) -> Tensor:
    """Compute the update `(o, i)` without its scale, by the inverse transform of half of the spectrum."""
    half, u, v = i // 2 + 1, at // i, at % i
    mirror = (o - u) % o  # the row of the negative frequency
    rows, cols = torch.where(v < half, u, mirror), torch.minimum(v, i - v)
    alone = (v == 0) | (2 * v == i)  # the negative is in the same column, and so in the same half
    places = torch.cat([rows, mirror]).long() * half + torch.cat([cols, cols])
    spectrum = c.new_zeros(o * half).index_add(0, places, torch.cat([c, c * alone]) / 2).view(o, half)
    return torch.fft.irfft2(torch.complex(spectrum, torch.zeros_like(spectrum)), s=(o, i))


@checked
def fourierft(
    params: FourierFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, scaling: float = 150.0, seed: int = 777
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + Delta x`. A plain weight takes places drawn from `seed`. The module's docstring has the formula and the shapes."""
    c, o, i = params["c"], W.out_features, W.in_features
    if not x.numel():  # MKL transforms no empty batch; the gradient is zero, and not missing
        y = W(x)
        return y + 0 * c.sum().to(y.dtype)
    dtype = torch.promote_types(x.dtype, torch.float32)  # there are no transforms of bfloat16
    c, at, tokens = scaling * c.to(dtype), places_of(W, len(c), seed), x.numel() // i
    if is_dense(len(at), W) and tokens > max(FEW, o * i // (o + i)):
        return W.updated_by(x, lambda c: dense_update(c, at, o, i).to(x.dtype), c)
    with full_precision(x):
        update = transformed(c / i, at, x.to(dtype), W)
    y = W(x)
    return y + update.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    """Config of FourierFT.

    Args:
        n_frequency: number of trained coefficients, from 1 to `i o`.
        scaling: factor `alpha` of the update, dimensionless, >= 0.
        seed: of the places, the same for all layers; PEFT's `random_loc_seed`.
        init, start: `"zeros"`, or `"normal"` for PEFT's start; one option, kept as `start`, since `init` is the method.
    """

    name = "fourierft"
    uses = frozenset({"output", "vectors"})
    trained = "n_frequency"
    macs = "2 * (i // 2 + 1) * (o // 2 + 1) if i * o <= 512 * n_frequency else 2 * n_frequency"

    n_frequency: Size = 1000
    scaling: NonNegative = 150.0
    seed: Count = 777
    start: Literal["zeros", "normal"] = "zeros"
    init: InitVar[str]

    @property
    def identity(self) -> float | None:
        """Exact from zeros, none from a random start."""
        return 0.0 if self.start == "zeros" else None

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        return drawn_places(self, W)

    def init(self, W: Frozen, generator: torch.Generator) -> FourierFTParams:
        c = torch.zeros(self.n_frequency)
        return {"c": c if self.start == "zeros" else c.normal_(generator=generator)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return fourierft(params, W, x, scaling=self.scaling, seed=self.seed)
