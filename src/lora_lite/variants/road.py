r"""ROAD: every pair of outputs is rotated and stretched.

$$\begin{pmatrix} y_1 \\ y_2 \end{pmatrix} = \begin{pmatrix} \alpha_{11} \cos\theta_{11} & -\alpha_{12} \sin\theta_{12} \\
\alpha_{21} \sin\theta_{21} & \alpha_{22} \cos\theta_{22} \end{pmatrix}
\begin{pmatrix} h_1 \\ h_2 \end{pmatrix}, \qquad h = W x + b, \quad \alpha = 1 + a$$

The outputs are cut into groups, and element `k` of a group's first half is paired with element `k` of its second half. `"road_1"` has
one `(theta, a)` for all four entries of a pair, a rotation times a stretch; `"road_2"` one for each row; `"road_4"` one for each entry.

Identity at init: exact, since `theta = 0` and `a = 0`.

Paper: Liao, Monz, *3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability*, 2024,
arXiv:2409.00119, eq. (2)-(4), table 1.

| tensor | shape | trained | init |
|---|---|---|---|
| `theta` | `(p,)` | yes | zeros |
| `a` | `(p,)` | yes | zeros |

with `p = o/2`, `o`, `2o` for `"road_1"`, `"road_2"`, `"road_4"`, laid out as `(groups, group_size/2)`, `(groups, row, group_size/2)`,
`(groups, cos or sin, row, group_size/2)`. Trained per target: `o`, `2o`, `4o`. Needs nothing of the weight but its output.

Departures: the paper and PEFT train `alpha` itself, with neutral value one; `a` is its deviation, so that zero is the base model. The
paper pairs neighbours; PEFT pairs half groups, and so does this, since its checkpoints depend on it. The bias is rotated too, so a layer
without a bias stays without one. Strength `c` scales angles and deviations: with `a = 0` and `"road_1"`, `-c` is the exact inverse of `c`.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Even, Frozen, Params, checked, gate, require_divisor
from lora_lite.core.linalg import fixed, once

SIZES = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Each variant of ROAD, with the number of angles it has for a pair of outputs."""


class ROADParams(TypedDict):
    theta: Float[Tensor, " p"]
    a: Float[Tensor, " p"]


def layout(sizes: tuple[int, str, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each output, where the `theta` of its cosine lies, that of its sine, and the sine's sign, of `o` and the statics."""
    o, variant, group_size = sizes
    pair, half = SIZES[variant], group_size // 2
    at = torch.arange(pair * o // 2, device=device).view(-1, pair, half)  # (groups, 1 | 2 | 4, half)
    at_cos, at_sin = at.chunk(2, 1) if variant == "road_4" else (at, at)
    rows = (at_cos.expand(-1, 2, half), at_sin.expand(-1, 2, half), torch.tensor([[-1.0], [1.0]], device=device).expand(len(at), 2, half))
    return rows[0].flatten(), rows[1].flatten(), rows[2].flatten()


@checked
def road(params: ROADParams, W: Frozen, x: Float[Tensor, "*b i"], *, variant: str, group_size: int) -> Float[Tensor, "*b o"]:
    """Return `c h + s swap(h)` with `h = W x + b`, eq. (4). The module's docstring has the formula and the shapes."""
    y = W(x)
    # Entries are spread over whole rows: products with short ones, or of two halves apart that are joined, take twice the time.
    at_cos, at_sin, signs = fixed(layout, (y.shape[-1], variant, group_size), y.device)
    dtype = torch.promote_types(params["theta"].dtype, torch.float32)
    theta, a = params["theta"].to(dtype), params["a"].to(dtype)
    gain = 1 + a
    s = once((gain * theta.sin()).index_select(0, at_sin) * signs)
    swapped = y.view(*y.shape[:-1], y.shape[-1] // group_size, 2, group_size // 2).flip(-2).view(y.shape)
    if y.dtype.itemsize >= 4:
        return torch.addcmul(y * once((gain * theta.cos()).index_select(0, at_cos)).to(y.dtype), swapped, s.to(y.dtype))
    half = (0.5 * theta).sin()  # c - 1 = a - 2 (1 + a) sin(theta/2)^2: in few digits a small turn's cosine is one
    less_one = once(torch.addcmul(a, gain * half, half, value=-2).index_select(0, at_cos))
    return torch.addcmul(gate(y, less_one), swapped, s.to(y.dtype))


@dataclass(frozen=True, kw_only=True)
class ROADConfig(AdapterConfig):
    """Config of ROAD.

    Args:
        variant: one of `SIZES`: one `(theta, a)` for each pair of outputs, two or four.
        group_size: outputs in a group, even, a divisor of `o`; it decides only which outputs are paired.
    """

    name = "road"
    uses = frozenset({"output"})
    trained = "{'road_1': 1, 'road_2': 2, 'road_4': 4}[variant] * o"
    macs = "2 * o"

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Even = 64

    def init(self, W: Frozen, generator: torch.Generator) -> ROADParams:
        require_divisor(self, "group_size", W.out_features, "o", step=2)
        p = SIZES[self.variant] * W.out_features // 2
        return {"theta": torch.zeros(p), "a": torch.zeros(p)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return road(params, W, x, variant=self.variant, group_size=self.group_size)
