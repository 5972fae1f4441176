r"""SVFT: a sparse trained matrix between all of the weight's singular vectors.

$$y = W x + b + U M V^T x, \qquad W = U S V^T, \quad M_{ac} = 0 \ \text{outside of a fixed pattern}$$

With `k` singular directions, `min(i, o)` or `r`, the pattern is one of:

- `"plain"`, the diagonal: `k` numbers. The singular values become `|S + M|`, their vectors stay.
- `"banded"`, the entries with `|a - c| <= off_diag`: `n = k (2 off_diag + 1) - off_diag (off_diag + 1)` numbers.
- `"random"`, as many entries drawn without replacement.
- `"top_k"`, as many where `|<u_a, v_c>|` is largest, which has a meaning where `i = o` alone.

Identity at init: exact, since `M = 0`. With `start="random"`, the official code's, it is another model: `|M|` is about 0.7 for every layer.

Paper: Lingam, Tejaswi, Vavre, Shetty, Gudur, Ghosh, Dimakis, Choi, Bojchevski, Sanghavi, *SVFT: Parameter-Efficient Fine-Tuning with
Singular Vectors*, 2024, arXiv:2405.19597, eq. (1)-(2), truncation app. C.3.

| tensor | shape | trained | init |
|---|---|---|---|
| `m` | `(n,)` | yes | zeros, or Gaussian of variance `1 / (2 n)` |
| `U` | `(o, k)` | no | left singular vectors |
| `V` | `(k, i)` | no | right singular vectors, as rows |
| `at` (not `"plain"`) | `(n,)` | no | the places `a k + c` of the entries, ascending |

Trained per target: `k`, or `n`. Needs the dense weight once, at init.

The frozen factors are larger than the weight, twice as large for a square one, and so is their arithmetic. `r` keeps the top `r`
directions, for `r (i + o)` of both. A band goes diagonal by diagonal while it is narrow. Other patterns go entry by entry on a CPU,
and elsewhere as a matrix, which is the arithmetic declared here.

Departures: the official code replaces the weight by its factors and so rounds it, and makes it anew in each forward; here it stays. Its
`rank` throws the rest of the weight away, here `r` only bounds the pattern. It trains one more number in a layer, a gate with the sigmoid
0.5 at the start, which the paper does not have; the random start here has that half in it. It draws random places with replacement, so that
some coincide. Its `top_k` ranks signed products of rows of `U`, which are no singular vectors, with those of `V`: a choice at chance level
by the paper's definition, which is the one here. The paper writes `M` as `(o, i)` with square factors; the rest of it would be outside of
any pattern of the code.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    ANGLE,
    Constants,
    Frozen,
    Params,
    Rank,
    Size,
    SVDConfig,
    Way,
    checked,
    expect,
    leading_svd,
    require_rank,
)
from lora_lite.variants._entries import goes_by_entry, times_entries
from lora_lite.variants._inner import plus_inner

NARROW = 128  # a product of matrices does about as many multiply-adds in the time of one by a pass over the activations
K = "(r or min(i, o))"
BAND = f"((2 * off_diag + 1) * {K})"


class SVFTParams(TypedDict):
    m: Float[Tensor, " n"]


def entries(k: int, pattern: str, off_diag: int) -> int:
    """Return the number of entries of a pattern."""
    return k if pattern == "plain" else k * (2 * off_diag + 1) - off_diag * (off_diag + 1)


def places(U: Tensor, V: Tensor, pattern: str, off_diag: int, generator: torch.Generator) -> Tensor:
    """Choose the places `a k + c` of a pattern other than the diagonal, `(n,)`, ascending."""
    k = len(V)
    if pattern == "banded":
        a = torch.arange(k, device=V.device)
        return ((a[:, None] - a).abs() <= off_diag).flatten().nonzero().flatten()
    n = entries(k, pattern, off_diag)
    if pattern == "random":
        return torch.randperm(k * k, generator=generator, device=generator.device)[:n].sort().values
    return (V @ U).t().abs().flatten().topk(n).indices.sort().values


def singular_basis(W: Frozen, r: int | None, pattern: str, off_diag: int, generator: torch.Generator, svd: Way = "exact") -> Constants:
    """Compute the frozen factors of a layer, and the places of its pattern."""
    weight = W.dense()
    U, _, V = leading_svd(weight, r or min(weight.shape), svd, angle=ANGLE)
    at = {} if pattern == "plain" else {"at": places(U, V, pattern, off_diag, generator)}
    return {"U": U.to(weight.dtype), "V": V.to(weight.dtype), **at}


def by_diagonals(h: Tensor, m: Tensor, at: Tensor, off_diag: int) -> Tensor:
    """Return `M h` for a band: a pass over `h (*b, k)` for each diagonal."""
    k = h.shape[-1]
    a, c = at // k, at % k
    bands = m.new_zeros((2 * off_diag + 1) * k).index_copy(0, (c - a + off_diag) * k + a, m).view(-1, k)
    padded = F.pad(h, (off_diag, off_diag))
    y = bands[0] * padded[..., :k]
    for d in range(1, len(bands)):
        y = torch.addcmul(y, bands[d], padded[..., d : d + k])
    return y


@checked
def svft(
    params: SVFTParams, W: Frozen, x: Float[Tensor, "*b i"], *, pattern: str = "plain", off_diag: int = 1, r: int | None = None
) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U M V^T x`. The module's docstring has the formula. A plain weight's random places have the seed 0."""
    basis = W.constants or singular_basis(W, r, pattern, off_diag, torch.Generator().manual_seed(0))
    U, V = (basis[name].to(x.dtype) for name in ("U", "V"))
    k, width = len(V), 2 * off_diag + 1
    if pattern == "plain":
        return plus_inner(W, x, U, V, torch.mul, (params["m"],), k)
    if pattern == "banded" and width * NARROW <= k:
        return plus_inner(W, x, U, V, lambda h, m: by_diagonals(h, m, basis["at"], off_diag), (params["m"],), width * k)
    at, m = basis["at"], params["m"]
    by_entry = goes_by_entry(x, m, at, k)
    cost = len(m) if by_entry else k * k
    return plus_inner(W, x, U, V, lambda h, m: times_entries(h, m, at), (m,), cost, columns=by_entry)


@dataclass(frozen=True, kw_only=True)
class SVFTConfig(SVDConfig):
    """Config of SVFT.

    Args:
        pattern: the entries of `M` that are trained, one of `"plain"`, `"banded"`, `"random"` and, on square weights, `"top_k"`.
        off_diag: diagonals on each side of a band, >= 1, less than the number of directions; `"random"` and `"top_k"` have as many entries.
        r: number of singular directions, the largest first, or None for all.
        start: `"zeros"`, the base model, or `"random"`, the official code's.
    """

    name = "svft"
    uses = frozenset({"output", "vectors", "dense"})
    trained = f"{K} if pattern == 'plain' else {BAND} - off_diag * (off_diag + 1)"
    macs = f"{K} * (i + o) + ({K} if pattern == 'plain' else {BAND} if pattern == 'banded' and {BAND} * {NARROW} <= {K} ** 2 else {K} ** 2)"

    pattern: Literal["plain", "banded", "random", "top_k"] = "plain"
    off_diag: Size = 1
    r: Rank | None = None
    start: Literal["zeros", "random"] = "zeros"

    @property
    def identity(self) -> float | None:
        """Relative tolerance of the identity at init."""
        return 0.0 if self.start == "zeros" else None

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        i, o = W.in_features, W.out_features
        if self.r is not None:
            require_rank(self, W)
        if self.pattern != "plain":
            k = self.r or min(i, o)
            expect(self, "off_diag", self.off_diag < k, f"less than {k}, the number of directions", "Lower it, or leave the layer out.")
        square = self.pattern != "top_k" or i == o
        expect(self, "pattern", square, f"one for a weight of {o} by {i}", 'Use "banded", or adapt square weights alone.')
        return singular_basis(W, self.r, self.pattern, self.off_diag, generator, self.svd)

    def init(self, W: Frozen, generator: torch.Generator) -> SVFTParams:
        n = entries(len(W.constants["V"]), self.pattern, self.off_diag)
        if self.start == "zeros":
            return {"m": torch.zeros(n)}
        return {"m": (0.5 / n) ** 0.5 * torch.randn(n, generator=generator, device=generator.device)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return svft(params, W, x, pattern=self.pattern, off_diag=self.off_diag, r=self.r)
