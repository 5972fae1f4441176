r"""C3A: an update of circulant blocks.

$$y = W x + b + \tfrac{1}{i} C x, \qquad C = \begin{pmatrix} C(w_{11}) & \cdots & C(w_{1n}) \\ \vdots & & \vdots \\
C(w_{m1}) & \cdots & C(w_{mn}) \end{pmatrix}, \quad C(w)_{k l} = w_{(l - k) \bmod k_0}$$

with `k0 = block_size`, `m = o / k0` and `n = i / k0`. A circulant block is a correlation: `F^{-1}(conj(F w) F x)` with the Fourier
transform `F`. Layers whose widths are large take this form, others the dense `C`.

Identity at init: exact, since `w = 0`; not with `init="xavier_uniform"`, PEFT's default, or its other random starts.

Paper: Chen, Cheng, Liu, Gao, Tsung, Li, Li, *Parameter-Efficient Fine-Tuning via Circular Convolution*, 2024, arXiv:2407.19342, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `w` | `(o / k0, i / k0, k0)` | yes | zeros |

Trained per target: `i o / block_size`. Needs nothing of the weight but its output. Multiply-adds of the form with transforms are complex
ones; the transforms themselves, `i` and `o` numbers a token, come on top.

Departures: it starts at the base model, where PEFT starts at random. PEFT's own backward pass gives wrong gradients to the layer's input
(seen in 0.21); these are the derivative of the forward.
"""

from dataclasses import InitVar, dataclass
from typing import Annotated, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Frozen, Params, Within, checked, full_precision, require_divisor
from lora_lite.core.linalg import fixed

WIDE = 200
"""Least harmonic width, `i o / (i + o)`, with which transforms are cheaper than a dense update, by measurement on a CPU."""


class C3AParams(TypedDict):
    w: Float[Tensor, "m n k"]


def is_wide(W: Frozen, size: int) -> bool:
    """Whether transforms of blocks are cheaper than a dense update. Small blocks leave many products for each frequency."""
    i, o = W.in_features, W.out_features
    return i * o > WIDE * (i + o) and size >= 16


def circulant(w: Tensor) -> Tensor:
    """Build the dense matrix `C (o, i)`."""
    m, n, k = w.shape
    rows = w.index_select(-1, fixed(_shifts, k, w.device)).view(m, n, k, k)
    return rows.transpose(1, 2).reshape(m * k, n * k)


def _shifts(size: int, device: torch.device) -> Tensor:
    steps = torch.arange(size, device=device)
    return ((steps - steps[:, None]) % size).flatten()


def correlate(w: Tensor, x: Tensor) -> Tensor:
    """Compute `C x` by transforms of blocks, in at least float32: `(*b, i) -> (*b, o)`."""
    m, n, k = w.shape
    dtype = torch.promote_types(x.dtype, torch.float32)  # there are no transforms of bfloat16
    with full_precision(x):
        blocks = torch.fft.rfft(x.to(dtype).reshape(-1, n, k)).permute(2, 0, 1)  # (frequencies, tokens, n)
        kernels = torch.fft.rfft(w.to(dtype)).conj().permute(2, 1, 0)  # (frequencies, n, m)
        product = torch.bmm(blocks, kernels).permute(1, 2, 0)
        return torch.fft.irfft(product, n=k).reshape(*x.shape[:-1], m * k)


@checked
def c3a(params: C3AParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + C x / i`. The module's docstring has the formula and the shapes."""
    w = params["w"] / W.in_features
    if not is_wide(W, w.shape[-1]) or not x.numel():  # MKL transforms no empty batch
        return W.updated_by(x, circulant, w)
    y = W(x)
    return y + correlate(w, x).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    """Config of C3A.

    Args:
        block_size: width of a circulant block, >= 1, a divisor of `i` and `o`.
        init, start: `"zeros"`, or PEFT's `"xavier_uniform"`, `"kaiming_uniform"` or `"gaussian"`; one option, kept as `start`, since
            `init` is the method.
    """

    name = "c3a"
    uses = frozenset({"output", "vectors"})
    trained = "i * o // block_size"
    # The dense form is paid for once a call.
    macs = "i * o // block_size ** 2 * (block_size // 2 + 1) if i * o > 200 * (i + o) and block_size >= 16 else 0"

    block_size: Annotated[int, Within(1)] = 256
    start: Literal["zeros", "xavier_uniform", "kaiming_uniform", "gaussian"] = "zeros"
    init: InitVar[str]

    @property
    def identity(self) -> float | None:
        """Exact from zeros, none from a random start."""
        return 0.0 if self.start == "zeros" else None

    def init(self, W: Frozen, generator: torch.Generator) -> C3AParams:
        i, o, k = W.in_features, W.out_features, self.block_size
        require_divisor(self, "block_size", i, "i")
        require_divisor(self, "block_size", o, "o")
        w = torch.zeros(o // k, i // k, k)
        if self.start == "gaussian":
            return {"w": w.normal_(generator=generator)}
        bound = {"zeros": 0.0, "xavier_uniform": (6 / (i + o)) ** 0.5, "kaiming_uniform": i**-0.5}[self.start]
        return {"w": w.uniform_(-bound, bound, generator=generator)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return c3a(params, W, x)
