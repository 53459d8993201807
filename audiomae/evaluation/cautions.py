"""What a reader has to know before believing a figure: hubs, few queries, queries that were trained on."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

from audiomae.corpus.paths import join
from audiomae.evaluation.runs import RunResult
from audiomae.storage import read_bytes, to_path

HUB_K = 10
BAD_SKEW = 2.0
FEW_QUERIES = 30
CORPUS_ROOT = b"corpus_root"  # metadata of items.parquet


def hubness(run: RunResult, k: int = HUB_K) -> dict[str, float]:
    """How unevenly the gallery is found: k-occurrences of its rows over all queries.

    Radovanovic, Nanopoulos, Ivanovic 2010, *Hubs in Space*: N_k of a row is the number of queries that have it among
    their first k; its skewness is near 0 without hubs and large where few rows answer everything.

    Returns `k`; `skew`; `largest`, the share of the queries that the most frequent row answers; `never`, the share of
    the rows that are among nobody's first k.
    """
    top = run.scores.top[:, :k]
    counts = np.bincount(top[top >= 0], minlength=len(run.rows))
    return {
        "k": k,
        "skew": float(stats.skew(counts)) if np.ptp(counts) else 0.0,
        "largest": float(counts.max() / max(1, len(top))),
        "never": float((counts == 0).mean()),
    }


def cautions(run: RunResult, trained_on: Collection[str] = ()) -> list[str]:
    """Sentences for the report and the log; none when there is nothing to be careful about.

    Args:
        run: the evaluated run.
        trained_on: full addresses of the files whose clips its encoder learnt from.
    """
    found = []
    queries, classes = len(run.scores), len(set(run.rows.labels.tolist()))
    if classes == 1:
        found.append("every row has the same label, so everything that is found is right: these figures mean nothing")
    if queries < FEW_QUERIES:
        found.append(
            f"only {queries} queries: each is {100 / queries:.0f} points of R@1, so read no more digits than that"
        )
    hubs = hubness(run)
    if hubs["skew"] > BAD_SKEW and queries >= FEW_QUERIES:
        found.append(
            f"hubs: one row is among the first {HUB_K} of {hubs['largest']:.0%} of the queries, {hubs['never']:.0%} of "
            f"the rows are among nobody's (k-occurrence skew {hubs['skew']:.1f}, bad above {BAD_SKEW:g}): look for "
            "silent or broken clips, or train with encoder.centred=true"
        )
    return [*found, *_trained_on(run, trained_on)]


def _trained_on(run: RunResult, trained_on: Collection[str]) -> list[str]:
    uris = run.rows.uris[run.scores.query_rows]
    known = np.array([join(run.rows.corpus_root, str(uri)) in trained_on for uri in uris])
    if not known.any():
        return []
    text = f"{int(known.sum())} of {len(known)} queries were trained on, so this measures memory as well"
    fresh = run.scores.values["R@1"][~known]
    fresh = fresh[~np.isnan(fresh)]
    if not len(fresh):
        return [f"{text}; none was held out"]
    precision = run.scores.values["AP"][~known]
    digits = 3 if len(fresh) >= FEW_QUERIES else 1
    return [
        f"{text}; the {len(fresh)} held-out ones alone: R@1 {int(fresh.sum())} of {len(fresh)}, "
        f"mAP {np.nanmean(precision):.{digits}f}"
    ]


def trained_files(encoder: str) -> set[str]:
    """Addresses of the files that an encoder was trained on, from the run it lies in; empty when that is not known."""
    path = to_path(encoder).parent / "items.parquet"
    if encoder.startswith(("official:", "timm:")) or not path.exists():
        return set()
    items = pq.read_table(io.BytesIO(read_bytes(path)))
    metadata: dict[bytes, Any] = items.schema.metadata or {}
    root = metadata.get(CORPUS_ROOT, b"").decode()
    training = zip(items["uri"].to_pylist(), items["validation"].to_pylist(), strict=True)
    return {join(root, uri) for uri, held_out in training if not held_out}
