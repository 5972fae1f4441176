r"""OSF: the minor singular triplets of the weight are trained, orthogonally to the major ones.

$$y = W x + b + \left( U S V - U_0 S_0 V_0 \right) x, \qquad W = U_h S_h V_h + U_0 S_0 V_0$$

with `U = U_0 + dU`, `S = S_0 + dS` and `V = V_0 + dV`. The `effective_rank` largest triplets, those with an `h`, stay as they are. The
difference is evaluated by the displacements, so that no large terms cancel.

`project` is the method's other half: it removes from `dU` what lies along `U_h`, and from `dV` what lies along `V_h`. PEFT does so with the
gradients, which is `project(grads, adapt.constants)` before the optimiser's step. `update`, called after it, does so with the params: under
Adam, too, they stay orthogonal then; see [Training](../training.md).

Identity at init: exact, since all three are 0.

Paper: Nayak, Killamsetty, Han, Bhandwaldar, Chanda, Xu, Wang, Pareja, Silkin, Eyceoz, Srivastava, *Sculpting Subspaces: Constrained Full
Fine-Tuning in LLMs for Continual Learning*, 2025, arXiv:2504.07097.

| tensor | shape | trained | init |
|---|---|---|---|
| `dU` | `(o, k)` | yes | zeros |
| `dS` | `(k,)` | yes | zeros |
| `dV` | `(k, i)` | yes | zeros |
| `U0`, `S0`, `V0` | `(o, k)`, `(k,)`, `(k, i)` | no | the minor triplets of the weight |
| `U_h` where `o > i`, `V_h` where `i > o` | `(o, h)`, `(h, i)` | no | the major singular vectors; elsewhere the minor ones imply them |

Trained per target: `k (i + o + 1)` with `k = min(i, o) - effective_rank`. Needs the dense weight once, at init. Where a call has so many
tokens that it is cheaper, the update is built as a matrix.

Departures: displacements are trained, so weight decay pulls towards the base model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Frozen, Params, Size, Within, checked, expect, truncated_svd
from lora_lite.core.tree import AnyTree, apart, together


class OSFParams(TypedDict):
    dU: Float[Tensor, "o k"]
    dS: Float[Tensor, " k"]
    dV: Float[Tensor, "k i"]


def project(tree: AnyTree, constants: AnyTree) -> dict[str, dict[str, Tensor]]:
    """Return a tree of params or gradients without what lies along the major singular vectors. Other variants' leaves stay as they are."""
    projected, fixed = apart(tree), apart(constants)
    for place, leaves in projected.items():
        if set(leaves) == {"dU", "dS", "dV"}:
            c = {name: t.to(leaves["dU"].dtype) for name, t in fixed[place].items()}
            leaves["dU"] = _across(leaves["dU"], c["U0"], c.get("U_h"))
            leaves["dV"] = _across(leaves["dV"].mT, c["V0"].mT, c["V_h"].mT if "V_h" in c else None).mT
    return together(projected)


def _across(d: Tensor, minor: Tensor, major: Tensor | None) -> Tensor:
    """Remove from columns what lies along the major vectors. Where all of them are a whole basis, the minor ones span the rest."""
    return minor @ (minor.mT @ d) if major is None else d - major @ (major.mT @ d)


@checked
def osf(params: OSFParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `W x + b + (U S V - U0 S0 V0) x`. The module's docstring has the formula and the shapes."""
    U0, S0, V0 = (W.constants[name].to(x.dtype) for name in ("U0", "S0", "V0"))
    dU, dS, dV = params["dU"], params["dS"], params["dV"]
    start, moved = U0 * S0, dU * (S0 + dS) + U0 * dS
    left, right = torch.cat([start + moved, moved], dim=1), torch.cat([dV, V0])  # (o, 2k), (2k, i)
    (o, rank), i = left.shape, right.shape[1]
    tokens = x.numel() // i
    if tokens * (rank * (i + o) - i * o) > rank * i * o:
        return W.updated(x, left @ right)
    return W.updated_low_rank(x, (right, left))


@dataclass(frozen=True, kw_only=True)
class OSFConfig(AdapterConfig):
    """Config of OSF.

    Args:
        effective_rank: number of major triplets that stay, less than the smaller width of the layer; a share of that width, in (0, 1); or
            None for half of it.
    """

    name = "osf"
    uses = frozenset({"output", "vectors", "dense"})
    trained = "k * (i + o + 1)"
    macs = "2 * k * (i + o)"

    effective_rank: Size | Annotated[float, Within(0, 1, above=True)] | None = None

    def sizes(self, i: int, o: int) -> Mapping[str, int]:
        """Return the number of triplets that are trained, `k`."""
        width, rank = min(i, o), 0.5 if self.effective_rank is None else self.effective_rank
        return {"k": width - (int(width * rank) if isinstance(rank, float) else rank)}

    def constants(self, W: Frozen, generator: torch.Generator, stats: object = None) -> Constants:
        i, o = W.in_features, W.out_features
        h = min(i, o) - self.sizes(i, o)["k"]
        fits = 0 < h < min(i, o)
        expect(self, "effective_rank", fits, f"from 1 to {min(i, o) - 1} triplets for a layer of shape ({o}, {i})", "Leave the layer out.")
        weight = W.dense()
        U, S, V = (t.to(weight.dtype) for t in truncated_svd(weight, min(i, o)))
        minor = {"U0": U[:, h:].clone(), "S0": S[h:].clone(), "V0": V[h:].clone()}
        return {**minor, **({"U_h": U[:, :h].clone()} if o > i else {"V_h": V[:h].clone()} if i > o else {})}

    def init(self, W: Frozen, generator: torch.Generator) -> OSFParams:
        U0, S0, V0 = (W.constants[name] for name in ("U0", "S0", "V0"))
        return {"dU": torch.zeros_like(U0), "dS": torch.zeros_like(S0), "dV": torch.zeros_like(V0)}

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return osf(params, W, x)

    def update(self, params: AnyTree, grads: AnyTree, state: Any = None) -> tuple[dict[str, Any], AnyTree]:
        """Make the params orthogonal to the major singular vectors again, after an optimiser's step.

        Args:
            params: the tree after the step; targets of other variants are passed through.
            grads: not used.
            state: `adapt.constants`.

        Returns:
            `(params, state)`, with new tensors. For an optimiser of torch's copy them into its leaves:
            `ll.tree_map(torch.Tensor.copy_, params, new)`.

        Raises:
            ValueError: where the state is None.
        """
        if state is None:
            way = "Call update(params, grads, adapt.constants)."
            raise ValueError(f"OSFConfig.update: expected adapt.constants as the state, found None. {way}")
        return project(params, state), state
