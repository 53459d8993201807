"""One protocol applied to every run alike, and runs set against each other on the queries they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from audiomae.evaluation.compare import bootstrap_mean, holm, paired_test
from audiomae.evaluation.protocol import ProtocolConfig
from audiomae.evaluation.rows import LabelledRows, shared_rows
from audiomae.metrics import Labelled, QueryScores, mean_values, score_protocol, summarise

TESTED = ("AP", "R@1")


@dataclass(frozen=True)
class RunResult:
    """What one run scored under a protocol."""

    rows: LabelledRows
    scores: QueryScores
    protocol: ProtocolConfig

    @property
    def name(self) -> str:
        return self.rows.name

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Means overall and per class, see :func:`audiomae.metrics.summarise`."""
        return summarise(self.scores)

    @cached_property
    def confidence(self) -> dict[str, dict[str, float]]:
        """Bootstrap interval of each metric, over recordings."""
        clusters = None if self.protocol.level == "clip" else self.rows.uris[self.scores.query_rows]
        return {
            "mAP" if name == "AP" else name: bootstrap_mean(
                column, clusters=clusters, resamples=self.protocol.resamples, seed=self.protocol.seed
            ).as_dict()
            for name, column in self.scores.values.items()
        }

    @cached_property
    def per_group(self) -> dict[str, dict[str, float]]:
        """The means of each query group; empty without groups."""
        if self.protocol.group is None or self.rows.groups is None:
            return {}
        groups = self.rows.groups[self.scores.query_rows]
        return {
            str(group): {
                **mean_values({name: column[groups == group] for name, column in self.scores.values.items()}),
                "num_queries": int((groups == group).sum()),
            }
            for group in sorted(set(groups.tolist()), key=lambda text: (len(text), text))
        }

    def group_spread(self, metric: str) -> tuple[float, float]:
        """Mean and sample deviation of a metric over the groups."""
        values = [means[metric] for means in self.per_group.values()]
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, as plain JSON values: metrics at the top level, then where they come from."""
        result = {**self.summary, "name": self.name, "confidence": self.confidence, "per_group": self.per_group}
        if self.per_group:
            spread = {metric: self.group_spread(metric) for metric in self.confidence}
            result["group_spread"] = {metric: {"mean": mean, "std": std} for metric, (mean, std) in spread.items()}
        return result


def evaluate_rows(rows: LabelledRows, protocol: ProtocolConfig) -> RunResult:
    """Let the rows query each other as the protocol says.

    Raises:
        ValueError: when no gallery or no query is left (one group only, unknown query group).
    """
    ks = tuple(sorted({1, *protocol.ks}))
    scores = score_protocol(
        Labelled(rows.vectors, rows.labels, rows.uris),
        groups=None if protocol.group is None else rows.groups,
        query_groups=protocol.query_groups,
        query_rows=_sampled(rows, protocol),
        ks=ks,
        knn_k=protocol.knn_k,
    )
    return RunResult(rows, scores, protocol)


def compare_runs(first: RunResult, others: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Paired tests of ``first`` against each other run on the queries both answered, for AP and R@1.

    Returns one dict per run and metric: ``first``, ``second``, ``metric``, the fields of
    :class:`audiomae.evaluation.compare.PairedComparison` and ``p_holm``, corrected over the runs.

    Raises:
        ValueError: when a run shares no query with ``first``.
    """
    found: list[dict[str, Any]] = []
    for metric in TESTED:
        tests = [_test(first, other, metric) for other in others]
        for test, corrected in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
            found.append({**test, "p_holm": corrected})
    return found


def _test(first: RunResult, other: RunResult, metric: str) -> dict[str, Any]:
    mine, theirs = shared_rows(_query_keys(first), _query_keys(other))
    if not len(mine):
        raise ValueError(f"{other.name}: shares no query with {first.name}; both must embed the same corpus")
    uris = first.rows.uris[first.scores.query_rows][mine]
    outcome = paired_test(
        first.scores.values[metric][mine],
        other.scores.values[metric][theirs],
        clusters=None if first.protocol.level == "clip" else uris,
        resamples=first.protocol.resamples,
        seed=first.protocol.seed,
    )
    named = "mAP" if metric == "AP" else metric
    return {"first": first.name, "second": other.name, "metric": named, **outcome.as_dict()}


def _query_keys(run: RunResult) -> list[tuple[str, float]]:
    keys = run.rows.keys
    return [keys[row] for row in run.scores.query_rows]


def _sampled(rows: LabelledRows, protocol: ProtocolConfig) -> npt.NDArray[np.int64] | None:
    """The asking rows of a large set: those whose key hashes lowest, so that every run samples the same ones."""
    if len(rows) <= protocol.max_queries:
        return None
    hashes = [
        hashlib.blake2b(f"{protocol.seed}/{uri}/{start}".encode(), digest_size=8).digest() for uri, start in rows.keys
    ]
    return np.sort(np.argsort(np.array(hashes), kind="stable")[: protocol.max_queries])
