r"""KaSA: LoRA with trained singular values, in the place of the weight's smallest singular components.

$$y = W x + b + s\, B\, \mathrm{diag}(d)\, A x - U_r S_r V_r^T x, \qquad s = \alpha / r \text{ or } \alpha / \sqrt{r}$$

The `r` smallest singular components of the weight, which the paper takes for noise, are taken out; what is trained has their form. The
regularisers of the loss, `regularisation(params, constants, cfg)`, keep `d` small and the columns of `B` and the rows of `A` orthonormal.

Identity at init: exact. The trained factors begin as the components that are taken out, `B_0 = U_r`, `d_0 = S_r / s`, `A_0 = V_r^T`, and
the params are their displacements. With `start="truncated"`, the paper's and PEFT's, there is none: `B = 0`, and the weight is cut.

Paper: Wang, Jiang, Park, Kim, Tang, *KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models*, 2024, arXiv:2412.06071,
eq. (5)-(11).

| tensor | shape | trained | init |
|---|---|---|---|
| `dA` | `(r, i)` | yes | zeros |
| `dB` | `(o, r)` | yes | zeros |
| `dd` | `(r,)` | yes | zeros |
| `A0` | `(r, i)` | no | `V_r^T`, of the smallest singular values |
| `B0` | `(o, r)` | no | `U_r` |
| `S0` | `(r,)` | no | `S_r` |

Trained per target: `r (i + o + 1)`. Needs the dense weight once, at init.

Departures: the start at the base model, with orthonormal factors as the regularisers ask for. No dropout. `alpha` defaults to 16, twice
PEFT's. The weight is not touched; PEFT cuts it in place. What is evaluated is `s dB diag(d) A + B_0 (s diag(dd) A + S_0 dA)`, in which
nothing cancels.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import (
    AdapterConfig,
    Constants,
    Frozen,
    NonNegative,
    Params,
    Positive,
    Rank,
    checked,
    expect,
    smallest_components,
)
from lora_lite.core.errors import require_targets
from lora_lite.core.tree import AnyTree, apart


class KaSAParams(TypedDict):
    dA: Float[Tensor, "r i"]
    dB: Float[Tensor, "o r"]
    dd: Float[Tensor, " r"]


def minor_components(W: Frozen, r: int) -> Constants:
    """Compute the `r` smallest singular components of the weight, `B0 diag(S0) A0`."""
    weight = W.dense()
    B0, S0, A0 = (t.to(weight.dtype) for t in smallest_components(weight, r))
    return {"A0": A0, "B0": B0, "S0": S0}


@checked
def kasa(params: KaSAParams, W: Frozen, x: Float[Tensor, "*b i"], *, scale: float) -> Float[Tensor, "*b o"]:
    """Return `W x + b + scale B diag(d) A x - B0 diag(S0) A0 x`. The module's docstring has the formula and the shapes."""
    start = W.constants or minor_components(W, len(params["dd"]))
    fixed = tuple(start[name].to(x.dtype) for name in ("A0", "B0", "S0"))
    return W.updated_low_rank(x, (params["dA"], params["dB"], scale * params["dd"]), start=fixed)


@dataclass(frozen=True, kw_only=True)
class KaSAConfig(AdapterConfig):
    """Config of KaSA.

    Args:
        r: rank of the update, from 1 to less than the smaller width of the layer.
        alpha: numerator of the scale, dimensionless, > 0.
        rslora: divide `alpha` by `sqrt(r)` instead of `r`.
        start: `"base"` for the base model, or `"truncated"`, the paper's: the weight without its `r` smallest components.
        beta: weight of the sum of `d^2` in `regularisation`, >= 0.
        gamma: weight of the distance from orthonormal factors there, >= 0.
    """

    name = "kasa"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "r * (i + o + 1)"
    macs = "2 * r * (i + o) + 3 * r"

    r: Rank = 8
    alpha: Positive = 16.0
    rslora: bool = False
    start: Literal["base", "truncated"] = "base"
    beta: NonNegative = 1e-4
    gamma: NonNegative = 1e-3

    @property
    def scale(self) -> float:
        """The factor of the update, `alpha / r` or `alpha / sqrt(r)`."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    @property
    def identity(self) -> float | None:
        """Exact with the start at the base model."""
        return 0.0 if self.start == "base" else None

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        o, i = W.out_features, W.in_features
        expected = f"less than min(i, o) = {min(i, o)} for a layer of shape ({o}, {i})"
        expect(self, "r", self.r < min(i, o), expected, "Lower r or leave the layer out.")
        return minor_components(W, self.r)

    def init(self, W: Frozen, generator: torch.Generator) -> KaSAParams:
        A0, B0, S0 = (W.constants[name] for name in ("A0", "B0", "S0"))
        if self.start == "base":
            return {"dA": torch.zeros_like(A0), "dB": torch.zeros_like(B0), "dd": torch.zeros_like(S0)}
        A, B = W.low_rank_start(self.r, generator)
        d = torch.randn(self.r, generator=generator)
        return {"dA": A.to(A0) - A0, "dB": B.to(B0) - B0, "dd": d.to(S0) - S0 / self.scale}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return kasa(params, W, x, scale=self.scale)


def regularisation(params: AnyTree, constants: AnyTree, cfg: KaSAConfig) -> Tensor:
    """Compute the term of the loss, eq. (9)-(11): the sum over targets of `beta ||d||^2 + gamma (||B^T B - I||_F + ||A A^T - I||_F)`.

    Args:
        params: the params tree; leaves of other variants take no part.
        constants: `adapt.constants`.
        cfg: the config of the targets.

    Returns:
        A scalar. The training loop adds it to its loss.
    """
    terms, fixed = [], apart(constants)
    for place, leaves in apart(params).items():
        if set(leaves) == {"dA", "dB", "dd"}:
            start = {name: t.to(leaves["dd"]) for name, t in fixed[place].items()}
            A, B, d = start["A0"] + leaves["dA"], start["B0"] + leaves["dB"], start["S0"] / cfg.scale + leaves["dd"]
            terms.append(cfg.beta * d.square().sum() + cfg.gamma * (_from_orthonormal(A @ A.mT) + _from_orthonormal(B.mT @ B)))
    require_targets("regularisation", terms, "KaSA")
    return torch.stack(terms).sum()


def _from_orthonormal(gram: Tensor) -> Tensor:
    """Sum `||G - I||_F` over a stack, or of one. Its gradient at orthonormal factors is zero within rounding; the norm itself has none."""
    n = gram.shape[-1]
    square = (gram - torch.eye(n, dtype=gram.dtype, device=gram.device)).square().sum((-2, -1))
    small = square <= (torch.finfo(gram.dtype).eps * n) ** 2 * 100
    return torch.where(small, 0, torch.where(small, 1, square).sqrt()).sum()
