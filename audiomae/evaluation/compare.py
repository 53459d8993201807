"""How sure a number is, and whether one run really beats another: bootstrap intervals and a paired test.

Queries are the sampling unit. Windows of one recording are not independent, so every function takes ``clusters`` and
then resamples, or flips, whole recordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
_DRAWS_PER_BATCH = 4_000_000  # numbers drawn at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap confidence limits."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PairedComparison:
    """``first`` against ``second`` on the same queries; ``difference`` = mean(first - second)."""

    num_queries: int
    mean_first: float
    mean_second: float
    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of float[Q] (Efron & Tibshirani 1993, chapter 13).

    NaN values (queries that have no score) are left out. With ``clusters`` [Q] whole clusters are drawn and the mean
    is that of their queries, which widens the interval where queries of a cluster agree.
    """
    sums, counts = _cluster_totals(values, clusters)
    if not len(sums):
        return Interval(0.0, 0.0, 0.0)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1 or np.ptp(sums / counts) == 0.0:
        return Interval(mean, mean, mean)  # nothing to resample
    found = stats.bootstrap(
        (sums, counts),
        lambda total, count, axis=-1: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWS_PER_BATCH // len(sums)),
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def paired_test(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Is the mean per-query difference of two runs more than chance?

    The two-sided p-value is that of the sign-flip permutation test on paired differences, which for retrieval needs no
    assumption on the distribution of average precision (Smucker, Allan & Carterette 2007, *A Comparison of
    Statistical Significance Tests for Information Retrieval Evaluation*); all flips are enumerated when there are
    few, else ``resamples`` are drawn. The limits are bootstrap limits of the mean difference.

    Args:
        first, second: float[Q], the same query in the same place; a query that is NaN in either is left out.
        clusters: [Q]; differences are averaged within a cluster first.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired_test: expected two arrays [Q] of equal length, got shapes {a.shape} and {b.shape}")
    known = ~(np.isnan(a) | np.isnan(b))
    if not known.any():
        raise ValueError("paired_test: no query has a score in both runs")
    groups = None if clusters is None else np.asarray(clusters)[known]
    a, b = a[known], b[known]
    sums, counts = _cluster_totals(a - b, groups)
    interval = bootstrap_mean(a - b, clusters=groups, resamples=resamples, seed=seed)
    return PairedComparison(
        num_queries=len(a),
        mean_first=float(a.mean()),
        mean_second=float(b.mean()),
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        p_value=_sign_flip_p(sums / counts, resamples, seed),
        wins=int((a > b).sum()),
        ties=int((a == b).sum()),
        losses=int((a < b).sum()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values that stay honest when several comparisons are made at once."""
    order = np.argsort(p_values, kind="stable")
    raw = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raw), 1.0) if len(order) else raw
    return [float(value) for value in adjusted]


def _sign_flip_p(differences: npt.NDArray[np.float64], resamples: int, seed: int) -> float:
    if not np.any(differences):
        return 1.0
    found = stats.permutation_test(
        (differences,),
        lambda flipped, axis=-1: flipped.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWS_PER_BATCH // len(differences)),
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _cluster_totals(
    values: npt.ArrayLike, clusters: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sum and count of the known values in each cluster, both float64[C]; each value its own cluster without any."""
    data = np.asarray(values, np.float64)
    known = ~np.isnan(data)
    if clusters is None:
        return data[known], np.ones(int(known.sum()))
    labels: npt.NDArray[Any] = np.asarray(clusters)
    if labels.shape != data.shape:
        raise ValueError(f"clusters: expected one per value ({data.shape}), got shape {labels.shape}")
    codes = np.unique(labels[known], return_inverse=True)[1]
    counts = np.bincount(codes).astype(np.float64)
    return np.bincount(codes, weights=data[known]).astype(np.float64), counts
