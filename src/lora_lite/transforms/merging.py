"""Ways to combine updates entry by entry: sums, magnitude pruning, DARE's random pruning, and TIES' majority of signs.

Each takes the updates of one tensor in several adapters. They are those of PEFT's `add_weighted_adapter`, in `peft/utils/merge_utils.py`,
which names them with `_svd` where it applies them to updates.

Papers: Yadav, Tam, Choshen, Raffel, Bansal, *TIES-Merging: Resolving Interference When Merging Models*, 2023, arXiv:2306.01708, sec. 3.
Yu, Yu, Yu, Huang, Li, *Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch*, 2023,
arXiv:2311.03099, sec. 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lite.transforms.product import Matrix, Product, dense, summed

Weights = Sequence[Tensor]
Prune = Callable[[Tensor, float, torch.Generator], Tensor]


def total(updates: Sequence[Tensor], weights: Weights) -> Tensor:
    """Sum the weighted updates."""
    return sum((w * u for w, u in zip(weights, updates)), torch.zeros_like(updates[0]))


def elected_mean(updates: Sequence[Tensor], weights: Weights) -> Tensor:
    """Average the weighted updates over those whose sign is that of the sum of all, which TIES calls the elected sign.

    The sign is elected before weighting, and the mean counts adapters rather than their weights, both as in PEFT.
    """
    elected = torch.where(sum(updates, torch.zeros_like(updates[0])) >= 0, 1.0, -1.0)
    agree = [(u.sign() == elected).to(u) for u in updates]
    return total([u * a for u, a in zip(updates, agree)], weights) / torch.stack(agree).sum(0).clamp(min=1)


def largest(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep the entries of largest magnitude, a share `density` of them and at least one."""
    count = min(update.numel(), max(1, int(density * update.numel())))
    kept = update.abs().flatten().topk(count).indices
    return torch.zeros_like(update).flatten().index_fill(0, kept, 1.0).view_as(update) * update


def drawn(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`, divided by it, so that the mean stays. The draw is made on the CPU."""
    kept = torch.rand(update.shape, generator=generator) < density
    return update * kept.to(update) / density


@dataclass(frozen=True)
class Method:
    """A way to combine updates.

    Attributes:
        prune: thins each update out first; None for a method that reads no density.
        join: combines the weighted updates.
        keep: the form of a sum without loss: `"factors"` side by side, or one `"basis"` for all. None for the best approximation of a rank.
    """

    prune: Prune | None = None
    join: Callable[[Sequence[Tensor], Weights], Tensor] = total
    keep: str | None = None

    def __call__(self, updates: Sequence[Matrix], weights: Weights, density: float | None, generator: torch.Generator) -> Matrix:
        """Combine the updates of one tensor. A sum of products is one."""
        products = [update for update in updates if isinstance(update, Product)]
        if self.prune is None and self.join is total and len(products) == len(updates):
            return summed(products, weights)
        tensors = [dense(update) for update in updates]
        if self.prune is not None and density is not None:
            tensors = [self.prune(tensor, density, generator) for tensor in tensors]
        return self.join(tensors, weights)


METHODS = {
    "cat": Method(keep="factors"),
    "linear": Method(keep="basis"),
    "svd": Method(),
    "ties": Method(prune=largest, join=elected_mean),
    "dare_linear": Method(prune=drawn),
    "dare_ties": Method(prune=drawn, join=elected_mean),
    "magnitude_prune": Method(prune=largest),
}
"""Every method by name."""
