"""How much of the exact answer an index finds, and the cheapest search settings that find enough of it.

Recall@k here counts a hit as right when it is at least as near as the k-th exact neighbour: clips with equal vectors
(silence, copies of one file) may stand in for one another. A query is itself in the index and never counts as its own
hit; queries come from the ids that training never sees (`audiomae.search.build.held_out`).
"""

from dataclasses import dataclass

import numpy as np

from audiomae.search.index import Searcher, Selection
from audiomae.search.spec import IndexSpec

K = 10
TIE = 1e-4  # float16 rounding of two equal vectors' similarities
BLOCK_ROWS = 65_536
REFINE_STEPS = (1, 2, 4, 8, 16)
PLATEAU = 5e-4  # recall gained by probing twice as many lists, below which the codes are what is missing


@dataclass(frozen=True)
class Recall:
    """What was measured: recall@k of `queries` held-out queries at these settings."""

    value: float
    queries: int
    spec: IndexSpec
    k: int = K


def exact_threshold(queries: np.ndarray, own: np.ndarray, rows: np.ndarray, live: np.ndarray, k: int) -> np.ndarray:
    """The similarity of each query's k-th nearest row, by exhaustive comparison.

    Args:
        queries: float32[Q, D].
        own: int64[Q], the row that each query is; it is passed over.
        rows: float16[N, D].
        live: bool[N], rows that can be found.
        k: how many; fewer when there are not so many rows.

    Returns:
        float32[Q].
    """
    k = min(k, int(np.count_nonzero(live)) - 1)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS].astype(np.float32)
        scores = queries @ block.T
        scores[:, ~live[start : start + BLOCK_ROWS]] = -np.inf
        inside = np.flatnonzero((own >= start) & (own < start + len(block)))
        scores[inside, own[inside] - start] = -np.inf
        joined = np.concatenate([best, scores], axis=1)
        best = np.partition(joined, joined.shape[1] - k, axis=1)[:, -k:]
    return best.min(axis=1)


def measure(
    searcher: Searcher, own: np.ndarray, threshold: np.ndarray, live: np.ndarray, spec: IndexSpec, k: int = K
) -> float:
    """Recall@k of the rows `own` as queries, against `threshold` from `exact_threshold`."""
    queries = searcher.rows[own].astype(np.float32)
    k = min(k, int(np.count_nonzero(live)) - 1)
    selection = None if live.all() else Selection.of(live)
    _, found = searcher.search(queries, k + 1, selection, spec)
    scores = np.einsum("qd,qnd->qn", queries, searcher.rows[found].astype(np.float32))
    right = (found >= 0) & (found != own[:, None]) & (scores >= threshold[:, None] - TIE)
    return float(np.minimum(right.sum(axis=1), k).mean() / k)


def tune(searcher: Searcher, live: np.ndarray, own: np.ndarray, target: float, k: int = K) -> Recall:
    """The first settings that reach `target`, or the best there are.

    The number of probed lists is doubled until the target is met; when that no longer helps, twice as many candidates
    are rescored and it starts over.

    Args:
        searcher: the index, its files checked.
        live: bool[N], rows that can be found.
        own: int64[Q], rows to use as queries.
        target: recall@k wanted.
    """
    spec = searcher.spec
    if np.count_nonzero(live) < 2:
        return Recall(1.0, 0, spec, k)
    threshold = exact_threshold(searcher.rows[own].astype(np.float32), own, searcher.rows, live, k)
    if spec.kind == "flat":
        return Recall(measure(searcher, own, threshold, live, spec, k), len(own), spec, k)
    best = Recall(0.0, len(own), spec, k)
    for refine in [step for step in REFINE_STEPS if step >= spec.refine]:
        nprobe, before = 1, 0.0
        while nprobe <= spec.nlist:
            trial = spec.model_copy(update={"nprobe": nprobe, "refine": refine})
            value = measure(searcher, own, threshold, live, trial, k)
            if value > best.value:
                best = Recall(value, len(own), trial, k)
            if value >= target:
                return best
            if nprobe >= 16 and value - before < PLATEAU:
                break
            nprobe, before = nprobe * 2, value
    return best


def choose_queries(ids: np.ndarray, live: np.ndarray, held_out: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows to query with, int64[Q]: held-out ones, or any when there are too few of them for a steady figure."""
    candidates = np.flatnonzero(live & held_out)
    if len(candidates) < min(count, 50):
        candidates = np.flatnonzero(live)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(candidates, size=min(count, len(candidates)), replace=False))
