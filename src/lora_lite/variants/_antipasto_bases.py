"""The bases of AntiPaSTO: frozen factors of a weight, by its SVD alone or by the second moments of the layer's inputs."""

from typing import Any

import torch
from torch import Tensor

from lora_lite.core import ANGLE, Constants, Frozen, SVDConfig, Way, leading_svd, require_rank
from lora_lite.variants.ssvd import singular_triplets

DAMPING = 1e-3  # added to the second moments, upstream's value


def derive_basis(cfg: SVDConfig, W: Frozen, r: int, basis: str, stats: Any = None) -> Constants:
    """Compute `U (o, r)`, `S (r)`, `Vh (r, i)`. `stats.second_moment` is `E[x x^T] (i, i)` of the layer's inputs.

    Raises:
        ValueError: where the layer has fewer than `r` directions, or the basis needs statistics and gets none that fit.
    """
    require_rank(cfg, W)
    if basis == "svd":
        return singular_triplets(W, r, cfg.svd)
    moment = getattr(stats, "second_moment", None)
    if moment is None or tuple(moment.shape) != (W.in_features, W.in_features):
        i = W.in_features
        found = "none" if moment is None else f"shape {tuple(moment.shape)}"
        raise ValueError(
            f'AntiPaSTOConfig.basis: expected, for "{basis}", stats.second_moment of shape ({i}, {i}), the mean of x x^T over the '
            f'layer\'s inputs, found {found}. Calibrate the model, or use basis="svd", which needs no data.'
        )
    return oriented_triplets(W, r, basis, moment, cfg.svd)


def oriented_triplets(W: Frozen, r: int, basis: str, second_moment: Tensor, svd: Way) -> Constants:
    """Compute factors `U (o, r)`, `S (r)`, `Vh (r, i)` with `U S Vh = U U^T W`.

    The directions are chosen or oriented by `E[x x^T] (i, i)` of the layer's inputs."""
    weight = W.dense()
    dtype = torch.promote_types(weight.dtype, torch.promote_types(second_moment.dtype, torch.float32))
    full, G = weight.to(dtype), second_moment.to(weight.device, dtype)
    if basis == "wanda":
        U, S, Vh = leading_svd(full, min(full.shape), "exact")
        scores = S * ((Vh @ G) * Vh).sum(1).clamp_min(0).sqrt()  # v^T G v: the mean square of v x
        keep = scores.topk(r).indices.sort().values
        U, S, Vh = U[:, keep], S[keep], Vh[keep]
    elif basis == "asvd":
        d = (G.diagonal() + DAMPING).sqrt()
        U, S, Vh = leading_svd(full * d, r, svd, angle=ANGLE)
        Vh = Vh / d
    else:
        # U and S of W L are those of W C^{1/2} for every L with L L^T = C, and so is Vh L^{-1} = S^{-1} U^T W; this one needs no root.
        L = torch.linalg.cholesky(G + DAMPING * torch.eye(len(G), dtype=dtype, device=G.device))
        U, S, Vh = leading_svd(full @ L, r, svd, angle=ANGLE)
        Vh = torch.linalg.solve_triangular(L, Vh, upper=False, left=False)
    S = S.to(torch.promote_types(weight.dtype, torch.float32)).clone()
    return {"U": U.to(weight.dtype).contiguous(), "S": S, "Vh": Vh.to(weight.dtype).contiguous()}
