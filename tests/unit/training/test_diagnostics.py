"""The gauges tell a collapsed batch from a spread one."""

import pytest
import torch
import torch.nn.functional as F

from audiomae.training import diagnostics


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_rankme_counts_equal_directions():
    assert diagnostics.rankme(torch.eye(16).repeat(4, 1)) == pytest.approx(16, rel=1e-3)
    assert diagnostics.rankme(unit(1, 16).repeat(64, 1)) == pytest.approx(1, abs=1e-3)
    two = torch.cat([unit(1, 16).repeat(8, 1), unit(1, 16, 1).repeat(8, 1)])
    assert 1.3 < diagnostics.rankme(two) <= 2.001


def test_mean_pairwise_cosine_matches_the_matrix():
    z = unit(20, 6)
    cosines = (z @ z.T)[~torch.eye(20, dtype=torch.bool)]
    assert diagnostics.mean_pairwise_cosine(z) == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert diagnostics.mean_pairwise_cosine(unit(1, 6).repeat(5, 1)) == pytest.approx(1.0, abs=1e-6)


def test_collapse_moves_every_gauge():
    spread, point = unit(64, 32), F.normalize(unit(1, 32) + 0.01 * unit(64, 32), dim=1)
    good = diagnostics.collapse_gauges(spread, F.normalize(spread + 0.05 * unit(64, 32, 1), dim=1))
    bad = diagnostics.collapse_gauges(point, point)
    assert bad["uniformity"] > good["uniformity"] + 1
    assert bad["rankme"] < good["rankme"]
    assert bad["mean_cosine"] > 0.99 > good["mean_cosine"]
    assert bad["alignment"] == pytest.approx(0.0, abs=1e-9) and good["alignment"] > 0
