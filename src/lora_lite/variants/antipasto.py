r"""AntiPaSTO: bounded changes of a weight's singular values and rotations of its singular vectors, with a coefficient of either sign.

With `p = V_r^T x` and a frozen basis `U_r, S_r, V_r`, each core replaces `S_r p` and leaves the rest of the weight:

$$y = W x + b + U_r \left[ \mathrm{core}_c(p) - S_r \odot p \right]$$

| core | `core_c(p)` at strength `c` |
|---|---|
| `rotation` | `R_u^T ((S + c delta_s) * R_v p)`, blocks `R = (I - c A / 2)^{-1} (I + c A / 2)` |
| `gain` | `S (1 + ELU(c g)) p` |
| `ablate` | `(I - c Chat diag(alpha) Chat^T) S p`, `Chat` the orthonormal columns of `C` |
| `arrow` | `[(1 + c M) S_b p_b; S_t (1 + ELU(c g)) p_t]`, `b` the first `block_size` coordinates |
| `dplr` | `S (1 + ELU(c g)) p + c B A p` |

`A = skew(t / 2)` is bounded smoothly by `a = 2 tan(max_rotation_angle / 2)`. `steer` gives the params at strength `c`; for rotations,
`R(-c) = R(c)^T`. There `c` multiplies the bounded `A`: `steer` returns the `t` that gives `c A`, to rounding as long as `c A` itself
respects the bound, always for `|c| <= 1`; beyond it the angle stays at the bound.

Identity at init: exact for `gain`, `arrow` and `dplr`. Approximate for `rotation`, by about 4e-4 over the singular values: at
`delta_s = 0` nothing would tell `c = 1` from `c = -1`. Approximate for `ablate`, at most 5 % of `W x`: at `alpha = 0`, `C` has no gradient.

Paper: Clark, *AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations*, 2026, arXiv:2601.07473, eq. (3)-(8).
The ablation follows Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction*, 2024, arXiv:2406.11717.

| tensor | shape | trained | init |
|---|---|---|---|
| `delta_s` (rotation) | `(r,)` | yes | Gaussian, mean and std 4e-4 |
| `t` (rotation) | `(r / k, k (k - 1) / 2)`, two of them for both sides | yes | zeros; `k` is `block_size` |
| `g` (gain, dplr; arrow) | `(r,)`; `(r - block_size,)` | yes | zeros |
| `C`, `alpha` (ablate) | `(r, k)`, `(k,)` | yes | Gaussian, std 1/sqrt(r); 0.05 |
| `M` (arrow) | `(block_size, block_size)` | yes | zeros |
| `A`, `B` (dplr) | `(k, r)`, `(r, k)` | yes | uniform within 1/sqrt(r); zeros |
| `U`, `S`, `Vh` | `(o, r)`, `(r,)`, `(r, i)` | no | the basis; `S` in at least float32 |

Trained per target: see `trained`; 640 for a rotation of `r = 256`. Needs the dense weight once, at init.

Bases: `svd` takes the top singular values. `wanda` takes the singular vectors with the largest `S_j rms(v_j x)`. `corda` is upstream's
name for a whitened basis, the SVD of `W C^{1/2}` with `C = E[x x^T] + 1e-3`; it is not CorDA's decomposition, that of `W C`. `asvd`
is the same with the diagonal of `C`. In the last two `Vh` is a projector whose rows are not orthonormal.

Departures: the weight stays, where the paper and its code subtract `U S V^T` from it, so that low precision in the factors touches the
update alone. The angle is bounded by entry (`angle_clamp="element"`) as upstream, which bounds the true angle of a block of 4 by 1.10 for
a nominal 0.5 only; `"spectral"` bounds the true angle, by the norm of the block's vector. `wanda` scores by the root mean square,
upstream's rotation core by the mean absolute value. `alpha` is clamped to [0, 1] inside upstream's forward, which ends its gradient at the
edges and leaves no negative strength; here the forward takes it as it is, and `update` projects it back after a step. Signs of rotations
are lora-lite's: the paper's (7) and the other code bases have `-t`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from lora_lite.core import Constants, Frozen, Params, Rank, Size, SVDConfig, Within, expect, kaiming
from lora_lite.core.tree import apart, together
from lora_lite.variants import _antipasto_cores as cores
from lora_lite.variants._antipasto_bases import derive_basis

CORES = {
    "rotation": cores.antipasto_additive,  # where a side is rotated, antipasto_rotation
    "gain": cores.antipasto_gain,
    "ablate": cores.antipasto_ablate,
    "arrow": cores.antipasto_arrow,
    "dplr": cores.antipasto_dplr,
}
SIDES = {"V": (), "U": (), "both": (2,), "none": None}  # leading axes of t, by what is rotated
START = 4e-4  # mean and standard deviation of delta_s at init


def antipasto(
    params: Params,
    W: Frozen | Tensor,
    x: Tensor,
    *,
    core: str = "rotation",
    rotate_basis: str = "V",
    max_rotation_angle: float = 0.5,
    angle_clamp: str = "element",
) -> Tensor:
    """Return `W x + b + U [core(p) - S p]`. The module's docstring has the formulas. Each core's own function checks its shapes."""
    if core == "rotation" and rotate_basis != "none":
        bounds = {"max_rotation_angle": max_rotation_angle, "angle_clamp": angle_clamp}
        return cores.antipasto_rotation(params, W, x, rotate_basis=rotate_basis, **bounds)
    return CORES[core](params, W, x)


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(SVDConfig):
    """Config of AntiPaSTO.

    Args:
        r: number of directions of the basis, from 1 to the smaller width of the layer.
        core: `"rotation"`, `"gain"`, `"ablate"`, `"arrow"` or `"dplr"`.
        basis: `"svd"`, or by statistics of the inputs `"wanda"`, `"corda"` (whitened, not CorDA's), `"asvd"`.
        rotate_basis: which singular vectors the rotation core turns, `"V"` (inputs), `"U"` (outputs), `"both"` or `"none"`.
        block_size: size of a rotation's blocks, which divides `r`, or of the arrow's dense head; by default 4, and 8 for the arrow.
        max_rotation_angle: bound of the rotation, radians, in (0, pi).
        angle_clamp: `"element"` bounds each entry of `A`, `"spectral"` the block's angles themselves.
        k: rank of the ablate and dplr cores; by default 1 and 8.
    """

    name = "antipasto"
    uses = frozenset({"output", "vectors", "dense"})
    trained = (
        "{'rotation': r + r * (block_size - 1) // 2 * {'none': 0, 'both': 2}.get(rotate_basis, 1), 'gain': r, 'ablate': k * (r + 1), "
        "'arrow': block_size * block_size + r - block_size, 'dplr': r + 2 * r * k}[core]"
    )
    macs = (
        "{'rotation': r * (i + o) + r * (1 if rotate_basis == 'none' else block_size), 'gain': r * (i + o) + r, 'ablate': k * (i + o), "
        "'arrow': r * (i + o) + block_size * block_size + r - block_size, 'dplr': r * (i + o) + r + 2 * r * k}[core]"
    )

    r: Rank = 256
    core: Literal["rotation", "gain", "ablate", "arrow", "dplr"] = "rotation"
    basis: Literal["svd", "wanda", "corda", "asvd"] = "svd"
    rotate_basis: Literal["V", "U", "both", "none"] = "V"
    block_size: Size = None  # type: ignore[assignment]  # an integer from __post_init__ on, and so is k
    max_rotation_angle: Annotated[float, Within(0.0, math.pi, above=True)] = 0.5
    angle_clamp: Literal["element", "spectral"] = "element"
    k: Rank = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for field, usual in (("block_size", 8 if self.core == "arrow" else 4), ("k", 1 if self.core == "ablate" else 8)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, usual)
        super().__post_init__()
        if self.core == "rotation":
            expect(self, "block_size", self.block_size >= 2, "an integer >= 2", "A block of 1 has nothing to rotate.")
            whole = self.rotate_basis == "none" or self.r % self.block_size == 0
            expect(self, "r", whole, f"a multiple of block_size={self.block_size}", "Change one of the two.")
        if self.core == "arrow":
            expect(self, "block_size", self.block_size < self.r, f"less than r={self.r}", "The rest of the directions take gains.")
        if self.core == "ablate":
            expect(self, "k", self.k <= self.r, f"at most r={self.r}", "The directions to ablate are orthonormal.")

    @property
    def calibrated(self) -> bool:
        """Whether `constants` needs `stats.second_moment`: for every basis but the plain SVD."""
        return self.basis != "svd"

    @property
    def identity(self) -> float:
        """The output's relative error at init. For the rotation core, singular values must not be small beside one."""
        return {"rotation": 1e-3, "ablate": 0.05}.get(self.core, 0.0)

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        return derive_basis(self, W, self.r, self.basis, stats)

    def init(self, W: Frozen, generator: torch.Generator) -> Params:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        r, k, size = self.r, self.k, self.block_size
        if self.core == "rotation":
            params = {"delta_s": START + START * normal(r)}
            axes = SIDES[self.rotate_basis]
            return params if axes is None else {**params, "t": torch.zeros(*axes, r // size, size * (size - 1) // 2)}
        if self.core == "ablate":
            return {"C": normal(r, k) / math.sqrt(r), "alpha": torch.full((k,), 0.05)}
        if self.core == "arrow":
            return {"M": torch.zeros(size, size), "g": torch.zeros(r - size)}
        low_rank = {"A": kaiming(k, r, generator), "B": torch.zeros(r, k)} if self.core == "dplr" else {}
        return {"g": torch.zeros(r), **low_rank}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        statics = ("core", "rotate_basis", "max_rotation_angle", "angle_clamp")
        return antipasto(params, W, x, **{name: getattr(self, name) for name in statics})

    def steer(self, params: Params, c: float | Tensor) -> Params:
        fixed = {"A", "C"}  # the update is linear in their partners B and alpha
        steered = {name: p if name in fixed else c * p for name, p in params.items()}
        if "t" in params:
            steered["t"] = cores.scaled(params["t"], c, self.max_rotation_angle, self.angle_clamp)
        return steered

    def update(self, params: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
        """Project a tree after an optimiser's step: `alpha` of the ablate core into [0, 1], where the core contracts. The rest stays."""
        project = {"alpha": lambda alpha: alpha.clamp(0, 1)}
        maps = apart(params).items()
        return together({at: {name: project.get(name, lambda p: p)(p) for name, p in leaves.items()} for at, leaves in maps}), state
