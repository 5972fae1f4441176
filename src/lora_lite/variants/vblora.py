r"""VB-LoRA: LoRA whose factors are put together from the vectors of one bank that all layers train.

$$y = W x + b + B A\, \mathrm{drop}(x), \qquad a = \sum_{j \in \mathrm{top}_k(u)} \mathrm{softmax}(u_{\mathrm{top}_k})_j\, v_j$$

Each row of `A` and each column of `B` is a chain of sub-vectors `a` of length `l`. A sub-vector mixes the `k` vectors of the bank that its
logits `u` name.

Identity at init: exact. Half of the bank starts at zero; `B` begins among its vectors, `A` among the others. With `start="random"`, the
paper's and PEFT's, there is none: the update is a product of two small random factors.

Paper: Li, Han, Ji, *VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks*, 2024, arXiv:2405.15179, sec. 3.

| tensor | shape | trained | init |
|---|---|---|---|
| `bank` | `(h, l)` | yes, shared | uniform within `init_vector_bank_bound`, the second half zeros |
| `logits_A` | `(r, i / l, h)` | yes | Gaussian, those of the second half lower than all others |
| `logits_B` | `(o / l, r, h)` | yes | Gaussian, those of the first half lower than all others |

Trained per target: `h r (i + o) / l`, and once `h l`. Needs nothing of the weight but its output.

Departures: the start at the base model, which keeps the cost and the files of the paper's form. The zero half learns first, as LoRA's `B`
does. Strength scales the bank, which both factors are made of: the update grows with its square, and has one sign. The vectors are chosen
by the logits as they are trained, in float32 under a bfloat16 model too: rounded ones would choose others than merged weights have.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Frozen,
    NonNegative,
    Params,
    Positive,
    Probability,
    Rank,
    Size,
    checked,
    dtype_for,
    expect,
    require_divisor,
)

SHORT = 128  # vectors in a bank; torch's topk of two takes another, faster way from here on


class VBLoRAParams(TypedDict):
    bank: Float[Tensor, "h l"]
    logits_A: Float[Tensor, "r p h"]
    logits_B: Float[Tensor, "q r h"]


def places(logits: Tensor, topk: int) -> Tensor:
    """Return the places `(n, topk)` of the largest of each row of `logits (n, h)`, the largest first.

    On a CPU two maxima of short rows take half the time of torch's `topk`, which is the quicker for long rows and for more places.
    """
    logits = logits.detach()
    if topk != 2 or logits.shape[-1] >= SHORT or logits.is_cuda:
        return logits.topk(topk).indices
    first = logits.argmax(-1, keepdim=True)
    second = logits.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
    return torch.cat([first, second], -1)


def mixtures(logits: Tensor, bank: Tensor, topk: int, cut: int) -> tuple[Tensor, ...]:
    """Return the sub-vectors `(cut, l)` and `(n - cut, l)` of `logits (n, h)`: of each row the `topk` best vectors of the bank, weighed.

    The weights are the softmax of the best logits. Each part has memory of its own, so that one without use for the gradient is let go.
    """
    numbers = torch.int32 if logits.numel() < 2**31 else torch.int64  # the places are many, and kept for the gradient
    index = places(logits, topk).to(numbers)
    rows = torch.arange(len(logits), device=logits.device, dtype=numbers)[:, None] * logits.shape[1]
    # (n, k). `gather` would keep all logits for its gradient.
    best = logits.flatten().index_select(0, (rows + index).flatten()).view_as(index)
    vectors = bank.index_select(0, index.flatten()).view(*index.shape, -1)  # (n, k, l)
    return tuple(part.sum(1) for part in (vectors * best.softmax(-1)[..., None]).tensor_split((cut,)))


@functools.partial(checked, cast=False)
def vblora(params: VBLoRAParams, W: Frozen, x: Float[Tensor, "*b i"], *, topk: int, dropout: float = 0.0) -> Float[Tensor, "*b o"]:
    """Return `W x + b + B A drop(x)`. The module's docstring has the formula and the shapes."""
    u, v = params["logits_A"], params["logits_B"]
    r, cut = len(u), u.shape[0] * u.shape[1]
    logits = torch.cat([u.flatten(0, 1), v.transpose(0, 1).flatten(0, 1)])  # both at once, by ranks, so that both factors are views
    A, B = (part.view(r, -1).to(dtype_for(W, x)) for part in mixtures(logits, params["bank"], topk, cut))
    return W.updated_low_rank(x, (A, B.t()), dropout=dropout)


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Config of VB-LoRA.

    Args:
        r: rank of the update, >= 1.
        num_vectors: number of vectors in the bank, `h`, at least `topk`, with `start="zero"` at least twice that.
        vector_length: length of a vector, `l`, a divisor of each width.
        topk: number of vectors that a sub-vector mixes, `k`, >= 1; with 1 the logits have no gradient, and stay as drawn.
        start: `"zero"` for the base model, `"random"` for the paper's start.
        init_vector_bank_bound: bound of the uniform vectors at the start, > 0.
        init_logits_std: standard deviation of the logits at the start, >= 0.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1), in training mode.
    """

    name = "vblora"
    uses = frozenset({"output", "project"})
    cast = False
    steered = ("bank",)
    trained = "num_vectors * r * (i + o) // vector_length"
    macs = "r * (i + o)"

    r: Rank = 4
    num_vectors: Size = 256
    vector_length: Size = 256
    topk: Size = 2
    start: Literal["zero", "random"] = "zero"
    init_vector_bank_bound: Positive = 0.02
    init_logits_std: NonNegative = 0.1
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.topk * (2 if self.start == "zero" else 1)
        expect(self, "num_vectors", self.num_vectors >= least, f"at least {least}", f"Lower topk={self.topk} or add vectors.")

    @property
    def identity(self) -> float | None:
        """Exact with the start at zero."""
        return 0.0 if self.start == "zero" else None

    def share_init(self, layers: Sequence[Frozen], generator: torch.Generator) -> Params:
        bound, bank = self.init_vector_bank_bound, torch.zeros(self.num_vectors, self.vector_length)
        (bank[: self.num_vectors // 2] if self.start == "zero" else bank).uniform_(-bound, bound, generator=generator)
        return {"bank": bank}

    def init(self, W: Frozen, generator: torch.Generator) -> dict[str, Tensor]:
        require_divisor(self, "vector_length", W.in_features, "i")
        require_divisor(self, "vector_length", W.out_features, "o")
        p, q, half = W.in_features // self.vector_length, W.out_features // self.vector_length, self.num_vectors // 2
        shapes = (self.r, p, self.num_vectors), (q, self.r, self.num_vectors)
        logits_A, logits_B = (torch.empty(shape).normal_(0, self.init_logits_std, generator=generator) for shape in shapes)
        if self.start == "zero":
            lower_all(logits_A[..., half:], logits_A)
            lower_all(logits_B[..., :half], logits_B)
        return {"logits_A": logits_A, "logits_B": logits_B}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return vblora(params, W, x, topk=self.topk, dropout=self.dropout)


def lower_all(some: Tensor, logits: Tensor) -> None:
    """Lower a part of fresh logits below all the others."""
    least, most = logits.aminmax()
    some -= 1 + most - least
