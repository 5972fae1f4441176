r"""AdaMSS: low-rank updates of groups of outputs, behind the weight's own principal input directions.

$$y_{g} = (W x + b)_{g} + B_g\, A_g\, V\, [x; 1], \qquad [W | b] \approx U S V \text{ of rank } r, \quad g = 1 \dots k$$

The outputs are grouped by k-means on the rows of `U`. Each group has an update of its own, of rank `subspace_rank`. Its bias comes with it
where the layer has one.

`update` is the method's other half, adaptive allocation, for the training loop to call after each optimiser's step: it smooths each entry's
sensitivity, scores the subspaces of the whole model, and freezes the lowest as they are, by a schedule; see [Training](../training.md).

Identity at init: exact, since `B = 0`.

Paper: *AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning*, 2025, OpenReview:8ZdWmpYxT0.

| tensor | shape | trained | init |
|---|---|---|---|
| `A` | `(n, r)`: the groups' matrices, one after the other | yes | right singular vectors of the group's rows of `U` |
| `B` | `(m,)`: the groups' matrices, laid out flat | yes | zeros |
| `V` | `(r, i)`, or `(r, i + 1)` with a bias | no | right singular vectors of the weight |
| `A0` | `(n, r)` | no | the start of `A` |
| `cells` | `(m,)` | no | places of `B` in a matrix `(o, n)` laid out flat |
| `shapes` | `(k, 2)` | no | number of outputs and rank of each group |

Trained per target: `n r + m`, with `n = k subspace_rank` and `m = o subspace_rank`, less where a group is smaller than its rank. Needs the
dense weight once, at init. The update is one of rank `n` in its multiply-adds, however large `r` is.

Departures: PEFT needs scikit-learn, whose k-means for PEFT's seed is repeated here. For the start of `A` it decomposes Gram matrices of the
groups by unseeded draws; here the decomposition is exact. A pure function has no flag to set, so a frozen subspace is one that is restored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Count, Frozen, Params, Positive, Probability, Rank, Size, add_low_rank, checked, expect
from lora_lite.variants._subspace_allocation import allocate, started
from lora_lite.variants._subspaces import seeded_svd, subspaces


class AdaMSSParams(TypedDict):
    A: Float[Tensor, "n r"]
    B: Float[Tensor, " m"]


@checked
def adamss(params: AdaMSSParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b` plus `B A V [x; 1]` in each group of outputs. The module's docstring has the formula and the shapes."""
    A, V = params["A"], W.constants["V"].to(x.dtype)
    (n, r), i, o = A.shape, x.shape[-1], W.out_features
    B = params["B"].new_zeros(o * n).index_copy(0, W.constants["cells"], params["B"]).view(o, n)
    if n * i > r * (i + n):
        return add_low_rank(W(x), F.linear(project(x, V), A), B)
    AV = A @ V  # paid for once a call
    y = W.updated_low_rank(x, (AV[:, :i], B))
    return y + B @ AV[:, i] if AV.shape[1] > i else y


def project(x: Tensor, V: Tensor) -> Tensor:
    """Return `V x`, or `V [x; 1]` where `V` has a column more."""
    i = x.shape[-1]
    return F.linear(x, V[:, :i], V[:, i] if V.shape[1] > i else None)


@dataclass(frozen=True, kw_only=True)
class AdaMSSConfig(AdapterConfig):
    """Config of AdaMSS. The allocation has PEFT's names and defaults.

    Args:
        r: rank of the weight's decomposition, >= 1; at most the widths of `[W | b]`.
        num_subspaces: number of groups of outputs, >= 1; at most their number.
        subspace_rank: rank of a group's update, >= 1; at most the group's size.
        use_dynamic_rank: whether a group's rank is lowered to the number of its large singular values.
        svd_threshold: the least square of a singular value that counts for it, as a share of the largest one's.
        random_seed: of the decomposition, which is randomised.
        use_asa: whether `update` freezes subspaces.
        asa_target_subspaces: number of subspaces of the whole model that are left.
        init_warmup: step at which pruning begins.
        final_warmup: step at which it ends, > `init_warmup`.
        mask_interval: steps between prunings.
        asa_importance_beta, asa_uncertainty_beta: smoothing of sensitivity and of its uncertainty, in [0, 1).
        asa_schedule_exponent: exponent of the schedule, > 0.
    """

    name = "adamss"
    uses = frozenset({"output", "vectors", "dense"})
    steered = ("B",)
    trained = "(n_b * r_b if biased else n * r) + o * subspace_rank"
    macs = "min(n * i, r * (i + n)) + n * o"

    r: Rank = 100
    num_subspaces: Size = 5
    subspace_rank: Size = 1
    use_dynamic_rank: bool = False
    svd_threshold: Probability = 0.1
    random_seed: Count = 0
    use_asa: bool = False
    asa_target_subspaces: Size = 50
    init_warmup: Count = 50
    final_warmup: Count = 1000
    mask_interval: Size = 100
    asa_importance_beta: Probability = 0.85
    asa_uncertainty_beta: Probability = 0.85
    asa_schedule_exponent: Positive = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        later = self.final_warmup > self.init_warmup or not self.use_asa
        expect(self, "final_warmup", later, f"more than init_warmup={self.init_warmup}", "Raise it.")

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the rank that the layer's widths allow, and the groups' ranks together; with `_b` those of a layer with a bias."""
        r, r_b, k = min(self.r, i, o), min(self.r, i + 1, o), min(self.num_subspaces, o)
        return {"r": r, "n": k * min(self.subspace_rank, r), "r_b": r_b, "n_b": k * min(self.subspace_rank, r_b)}

    def constants(self, W: Frozen, generator: torch.Generator, stats: object = None) -> Constants:
        U, V = self.factors(W)
        threshold = self.svd_threshold if self.use_dynamic_rank else None
        return subspaces(U, V, min(self.num_subspaces, len(U)), self.subspace_rank, threshold)

    def factors(self, W: Frozen) -> tuple[Tensor, Tensor]:
        """Compute `U (o, r)` and `V` of `[W | b]`."""
        weight = W.dense(torch.float32)
        if W.bias is not None:
            weight = torch.cat([weight, W.bias.detach().to(weight)[:, None]], dim=1)
        return seeded_svd(weight, min(self.r, *weight.shape), self.random_seed)

    def init(self, W: Frozen, generator: torch.Generator) -> AdaMSSParams:
        return {"A": W.constants["A0"].clone(), "B": torch.zeros(len(W.constants["cells"]))}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return adamss(params, W, x)

    def update(self, params: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
        """Freeze subspaces after an optimiser's step. The first call is step 0.

        Args:
            params: the tree of one adapter after the step; targets of other variants are passed through.
            grads: the gradients that the step used.
            state: `adapt.constants` at the first call, then what the last call returned.

        Returns:
            `(params, state)`, with frozen subspaces as they were, in new tensors. For an optimiser of torch's copy them into its leaves:
            `ll.tree_map(torch.Tensor.copy_, params, new)`.

        Raises:
            ValueError: where the state is None.
        """
        if not self.use_asa:
            return params, state
        if state is None:
            way = "Call update(params, grads, adapt.constants) the first time."
            raise ValueError(f"AdaMSSConfig.update: expected adapt.constants as the first state, found None. {way}")
        return allocate(self, params, grads, started(state))
