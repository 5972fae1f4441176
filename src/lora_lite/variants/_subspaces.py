"""AdaMSS's subspaces: the outputs of a layer in groups, by k-means on the left singular vectors of its weight.

PEFT's files do not hold the groups. They are those that scikit-learn gives, whose k-means from random rows is repeated here.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from lora_lite.core import Constants, truncated_svd


def seeded_svd(weight: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Compute `U (o, r)` and `V (r, i)` of the top `r` by PEFT's randomised decomposition, which draws from `seed`."""
    forked = {"devices": []} if weight.device.type == "cpu" else {"devices": [weight.device], "device_type": weight.device.type}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(seed)
        U, _, V = torch.svd_lowrank(weight, q=r, niter=2)
    return U, V.t().contiguous()


def numpy_uniform(seed: int) -> Callable[[], float]:
    """Return the draws of `numpy.random.RandomState(seed).random_sample`: the standard library's generator, seeded as numpy does."""
    words = [seed]
    for n in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + n) & 0xFFFFFFFF)
    generator = random.Random()
    generator.setstate((3, (*words, 624), None))
    return generator.random


def first_rows(n: int, k: int) -> list[int]:
    """Draw `k` of `n` rows as scikit-learn does for PEFT's seed: numpy's choice without replacement."""
    draw, left, found = numpy_uniform(123456789), torch.ones(n, dtype=torch.float64), dict[int, None]()
    while len(found) < k:
        left[list(found)] = 0.0
        steps = left.cumsum(0)
        drawn = torch.tensor([draw() for _ in range(k - len(found))], dtype=torch.float64)
        found |= dict.fromkeys(torch.searchsorted(steps / steps[-1], drawn, right=True).tolist())
    return list(found)


def clusters(rows: Tensor, k: int) -> Tensor:
    """Return the cluster of each row `(n,)`, by Lloyd's algorithm in at most ten rounds, with scikit-learn's way to stop."""
    rows = rows.detach().to("cpu", torch.float32)
    enough = rows.var(0, unbiased=False).mean() * 1e-4
    rows = rows - rows.mean(0)
    centres, labels = rows[first_rows(len(rows), k)], torch.full((len(rows),), -1)
    for _ in range(10):
        before, labels = labels, _nearest(rows, centres)
        moved = _means(rows, labels, centres)
        shift, centres = (moved - centres).square().sum(), moved
        if torch.equal(labels, before):
            return labels
        if shift <= enough:
            break
    return _nearest(rows, centres)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * rows @ centres.t()).argmin(1)


def _means(rows: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Return the mean of each cluster; one without rows takes the row that is furthest from its own centre."""
    counts = labels.bincount(minlength=len(centres)).to(rows)
    sums = torch.zeros_like(centres).index_add_(0, labels, rows)
    empty = (counts == 0).nonzero().flatten()
    furthest = (rows - centres[labels]).square().sum(1).topk(len(empty)).indices
    for cluster, row in zip(empty.tolist(), furthest.tolist()):
        sums[labels[row]] -= rows[row]
        counts[labels[row]] -= 1
        sums[cluster], counts[cluster] = rows[row], 1
    return sums / counts[:, None]


def are_steady(rows: Tensor, k: int) -> bool:
    """Whether the clusters are those of any arithmetic: none changes where the rows do by a rounding.

    Rows of one distance to each other, as those of a square orthonormal matrix, have clusters by rounding alone."""
    rows = rows.detach().to("cpu", torch.float32)
    labels, generator, size = clusters(rows, k), torch.Generator().manual_seed(0), 1e-6 * rows.abs().max()
    return all(torch.equal(labels, clusters(rows + size * torch.randn(rows.shape, generator=generator), k)) for _ in range(2))


def subspaces(U: Tensor, V: Tensor, k: int, rank: int, threshold: float | None) -> Constants:
    """Derive the constants of AdaMSS from the decomposition `U (o, r)`, `V (r, i)` of a weight, or `V (r, i + 1)` of one with a bias.

    Args:
        U, V: in at least float32.
        k: number of groups.
        rank: largest rank of a group.
        threshold: the least square of a group's singular value, as a share of the largest one's, that counts for its rank; or None.
    """
    labels = clusters(U, k).to(U.device)
    groups = [(labels == n).nonzero().flatten() for n in range(k)]
    starts = []
    for group in groups:
        _, S, directions = truncated_svd(U[group], min(len(group), rank, len(V)))
        starts.append(directions if threshold is None else directions[: max(1, int((S.square() > threshold * S[0].square()).sum()))])
    shapes = torch.tensor([(len(group), len(A)) for group, A in zip(groups, starts)])
    n = int(shapes[:, 1].sum())
    columns = torch.arange(n, device=U.device).split(shapes[:, 1].tolist())
    cells = torch.cat([(group[:, None] * n + own).flatten() for group, own in zip(groups, columns)])
    return {"V": V, "A0": torch.cat(starts), "cells": cells, "shapes": shapes}
