r"""FRoD: a diagonal and a few trained entries beside it, between a basis that layers of one sort share and directions of each weight.

$$y = W x + b + U (\mathrm{diag}(\Delta l) + S)\, V^T \mathrm{drop}(x), \qquad W = U\, \mathrm{diag}(l)\, V^T$$

`V` is a basis for the weights of all layers of a sort (the query projections of all blocks), from their joint decomposition: `W_k = Q_k R`
by one QR of them all, one above the other, and `V = R^T E`, with `E` the eigenvectors of the mean of `(Q_k^T Q_k + a I)^-1`, where `a` is
`regularization_alpha`. If they have fewer rows than columns, `V` holds the right singular vectors. `U` has unit columns, `l` their lengths
in `W V^-T`. `S` has trained entries at places off the diagonal, which are drawn once for each sort: it mixes the directions.

Identity at init: exact, since both are zero.

Paper: Wan, Chen, Feng, Zhou, Xu, *FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence*, 2025,
arXiv:2512.23485. The formula and the basis are those of PEFT.

| tensor | shape | trained | init |
|---|---|---|---|
| `lambda_l` | `(i,)` | yes | zeros |
| `lambda_s` | `(n,)` | yes | zeros |
| `V` | `(i, i)` | no | the basis, one in memory for all layers of a sort |
| `U` | `(o, i)` | no | the columns of `W V^-T`, of length 1 |
| `l` | `(i,)` | no | their lengths |
| `index` | `(2, n)` | no | the places of `lambda_s`, rows and columns |

Trained per target: `i + n`, `n = max(1, int(sparse_rate i^2))`. Needs the dense weights at build. The constants of a layer are as large as
its weight and more, in memory and in a file.

Departures: the method is a replacement of `W` by `U (diag(l) + S) V^T`, in which the base model is there to rounding alone, and a quantised
one is not at all. The difference to it is what is computed here, so that `l` is trained as its displacement. The product with `S` goes
entry by entry on a CPU. In transforms, compiled and on a GPU it is one with a dense matrix, unless `S` is very sparse: that is the
arithmetic declared here. Where that takes fewer multiply-adds the update is multiplied out first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, NonNegative, Params, Positive, Probability, checked
from lora_lite.variants._entries import goes_by_entry, times_entries
from lora_lite.variants._inner import plus_inner
from lora_lite.variants._sparse import DENSE, gathered


class FRoDParams(TypedDict):
    lambda_l: Float[Tensor, " i"]
    lambda_s: Float[Tensor, " n"]


def category(path: str) -> str:
    """Return the sort of a layer by its path, as PEFT names it: `layers.0.self_attn.q_proj` is of `self_attn_q_proj`."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else "_".join(parts[-2:])


def block(path: str, otherwise: int) -> int:
    """Return the number of a layer's block by its path, as PEFT reads it: after `layers`, or else the first number."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), otherwise)


def basis(weights: list[Tensor], alpha: float) -> Tensor:
    """Compute `V (i, i)` of weights `(o, i)` in float32, in PEFT's order of operations: its signs are in PEFT's files."""
    stacked = torch.cat(weights)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].t().contiguous()
    Q, R = torch.linalg.qr(stacked)
    eye = torch.eye(R.shape[1], dtype=R.dtype)
    inverses = [torch.linalg.inv(part.t() @ part + alpha * eye) for part in Q.split([len(w) for w in weights])]
    mean = torch.zeros_like(R)
    for inverse in inverses:
        mean = mean + inverse
    return R.t() @ torch.linalg.eigh(mean / len(inverses))[1]


def off_diagonal(i: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw places `(2, n)` off the diagonal of an `(i, i)` matrix, rows and columns, as PEFT does."""
    place = torch.randperm(i * i - i, generator=generator)[:n] if n else torch.empty(0, dtype=torch.int64)
    row, col = place // max(1, i - 1), place % max(1, i - 1)
    return torch.stack([row, col + (col >= row)]).int()


def entries(i: int, rate: float) -> int:
    """Count the trained entries off the diagonal."""
    n = min(int(i * i * rate), i * i - i)
    return max(1, n) if rate > 0 and i > 1 else n


def directions(W: Frozen, V: Tensor) -> Constants:
    """Compute `U (o, i)` and `l (i)` of the weight in the basis `V`, in float64."""
    weight, V = W.dense(torch.float64).cpu(), V.to("cpu", torch.float64)
    try:
        B = torch.linalg.solve(V, weight.t()).t()
    except torch.linalg.LinAlgError:  # a basis of less than full rank, as of a weight with columns of zeros
        B = weight @ torch.linalg.pinv(V, rtol=1e-6).t()
    length = B.norm(dim=0)
    U = torch.where(length > 1e-12, B / length.clamp_min(1e-12), 0.0)
    return {"U": U.float().contiguous(), "l": length.float()}


def alone(W: Frozen, n: int) -> Constants:
    """Derive the constants of a layer that is the only one of its sort, with PEFT's defaults."""
    V = basis([W.dense(torch.float32).cpu()], 1e-3)
    found = {"V": V, "index": off_diagonal(W.in_features, n, torch.Generator().manual_seed(0)), **directions(W, V)}
    return {name: c.to(W.device) for name, c in found.items()}


@checked
def frod(params: FRoDParams, W: Frozen, x: Float[Tensor, "*b i"], *, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + U (diag(lambda_l) + S) V^T drop(x)`. A plain weight is taken for the only one of its sort."""
    trained, i = (params["lambda_l"], params["lambda_s"]), W.in_features
    fixed, n = W.constants or alone(W, len(trained[1])), len(trained[1])
    index, dense = fixed["index"], i * i <= DENSE * n
    by_entry = goes_by_entry(x, torch.cat(trained), index, i)

    def places(index: Tensor) -> Tensor:
        return torch.cat([torch.arange(i, device=index.device) * (i + 1), index[0].long() * i + index[1]])

    def inner(h: Tensor, diagonal: Tensor, s: Tensor) -> Tensor:
        if dense or by_entry:
            return times_entries(h, torch.cat([diagonal, s]), index, places)
        return diagonal * h + gathered(h, index[0], index[1], s, i).to(h.dtype)

    U, V, cost = fixed["U"].to(x.dtype), fixed["V"].to(x.dtype).t(), i + n if by_entry or not dense else i * i
    return plus_inner(W, x, U, V, inner, trained, cost, dropout, columns=by_entry)


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(AdapterConfig):
    """Config of FRoD.

    Args:
        sparse_rate: share of the entries of `S` that are trained, >= 0.
        regularization_alpha: of the inverses in the joint decomposition, > 0.
        seed: of the places; PEFT's `projection_prng_key`.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "frod"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "i + n"
    macs = f"i * i + i * o + (i * i if i * i <= {DENSE} * n else i + n)"

    sparse_rate: NonNegative = 0.01
    regularization_alpha: Positive = 1e-3
    seed: Count = 0
    dropout: Probability = 0.0

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        return {"n": entries(i, self.sparse_rate)}

    def allot(self, layers: Mapping[str, Frozen]) -> Mapping[str, Constants]:
        weights: dict[str, dict[int, Tensor]] = {}
        for n, (path, W) in enumerate(layers.items()):  # PEFT takes the last of several of one sort in one block
            weights.setdefault(category(path), {})[block(path, n)] = W.dense(torch.float32).cpu()
        generator, found = torch.Generator().manual_seed(self.seed), {}
        for sort, of_block in sorted(weights.items()):
            V = basis([of_block[n] for n in sorted(of_block)], self.regularization_alpha)
            found[sort] = {"V": V, "index": off_diagonal(len(V), entries(len(V), self.sparse_rate), generator)}
        return {path: found[category(path)] for path in layers}

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        return directions(W, W.constants["V"])

    def init(self, W: Frozen, generator: torch.Generator) -> FRoDParams:
        return {"lambda_l": torch.zeros(W.in_features), "lambda_s": torch.zeros(entries(W.in_features, self.sparse_rate))}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return frod(params, W, x, dropout=self.dropout)
