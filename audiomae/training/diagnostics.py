"""Gauges of collapse: numbers that fall (or rise) when embeddings shrink to a point or a few directions."""

import torch
from torch import Tensor

from audiomae.training import losses


@torch.no_grad()
def rankme(embeddings: Tensor, eps: float = 1e-7) -> float:
    """Effective rank: exp of the entropy of the normalised singular values, between 1 and min(N, D).

    Garrido et al. 2023, *RankMe*, eq. 1. It cannot exceed the number of rows, so compare runs at equal N.

    Args:
        embeddings: float[N, D].
    """
    singular = torch.linalg.svdvals(embeddings.double())
    share = singular / singular.sum().clamp(min=eps) + eps
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def mean_pairwise_cosine(embeddings: Tensor) -> float:
    """Mean cosine over pairs of different rows: 1 when all point the same way, about 0 when they spread.

    Args:
        embeddings: float[N, D] unit rows, N >= 2.
    """
    z = embeddings.double()
    count = len(z)
    return float((z.sum(dim=0).pow(2).sum() - z.pow(2).sum()) / (count * (count - 1)))


@torch.no_grad()
def collapse_gauges(first: Tensor, second: Tensor) -> dict[str, float]:
    """All gauges of one batch of view pairs.

    Args:
        first, second: float[N, D] unit rows, two views of the same N clips, N >= 2.

    Returns:
        `alignment`, `uniformity`, `rankme`, `mean_cosine`.
    """
    return {
        "alignment": float(losses.alignment(first, second)),
        "uniformity": float(losses.uniformity(first)),
        "rankme": rankme(first),
        "mean_cosine": mean_pairwise_cosine(first),
    }
