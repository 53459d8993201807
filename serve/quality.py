"""How far the service's own answers can be trusted: scores as calibrated probabilities, and recall, watched live."""

import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from audiomae.search.audio_index import AudioIndex

LABEL = "label"
QUERIES, HITS, BINS, PARTS = 400, 10, 10, 5
MIN_PAIRS = 200
MAX_ERROR = 0.05
TIE = 1e-4  # float16 rounding of two equal vectors' similarities


@dataclass(frozen=True)
class Calibration:
    """From score to the probability that a hit has the query's label.

    Attributes:
        scores, probabilities: float[N], the curve, rising; between its points it is straight.
        error: expected calibration error on queries that a curve was not fitted to.
    """

    scores: np.ndarray
    probabilities: np.ndarray
    error: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities of scores, in their shape."""
        return np.interp(scores, self.scores, self.probabilities)


def calibrate(index: AudioIndex, rows: np.ndarray, seed: int = 0) -> Calibration | None:
    """Fit the probability that a hit has the query's label, by what the release's own items find.

    Items stand in for queries; what is of their own file does not count as a hit. The curve (isotonic regression) is
    fitted on all of them; its error is that of five curves, each fitted on four fifths of the queries and measured on
    the fifth that is left, in ten bins of equally many hits.

    Args:
        index: the opened release.
        rows: int64[N], rows of its items table that can be found.
        seed: of the choice of queries.

    Returns:
        None without labels, with too few pairs, or when the error is above 0.05: then a probability would mislead.
    """
    if LABEL not in index.columns:
        return None
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(rows)[:QUERIES]
    items = [item for item in index.table.rows(chosen, ["id", LABEL]) if item[LABEL] is not None]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for item in items:
        hits = index.search_id(item["id"], k=HITS, group_by="uri")
        found = [(score, hit[LABEL] == item[LABEL]) for score, hit in zip(hits.scores[0], hits.items[0], strict=False)]
        if found:
            scores, same = map(np.array, zip(*found, strict=True))
            pairs.append((np.minimum(scores, 1.0), same))
    if sum(len(scores) for scores, _ in pairs) < MIN_PAIRS or len(pairs) < PARTS:
        return None
    promised, happened = [], []
    for part in range(PARTS):
        curve = _fit([pair for number, pair in enumerate(pairs) if number % PARTS != part])
        scores, same = _joined(pairs[part::PARTS])
        promised.append(curve(scores))
        happened.append(same)
    error = calibration_error(np.concatenate(promised), np.concatenate(happened))
    return replace(_fit(pairs), error=error) if error <= MAX_ERROR else None


def _fit(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Calibration:
    from sklearn.isotonic import IsotonicRegression

    curve = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(*_joined(pairs))
    return Calibration(curve.X_thresholds_, curve.y_thresholds_, 0.0)


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    scores, same = zip(*pairs, strict=True)
    return np.concatenate(scores), np.concatenate(same)


def calibration_error(probabilities: np.ndarray, happened: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: |promised - happened|, averaged over bins of equally many, float[N] and bool[N]."""
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    gaps = [abs(probabilities[part].mean() - happened[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(order))


class RecallShadow:
    """Searches a share of the queries again, exactly, in a thread of the lowest priority, and counts what was missed.

    One at a time: while it is busy the queries that come are left out of the sample, so it never becomes a load.

    Args:
        share: of the queries, 0 to 1.
        seed: of the choice.
    """

    def __init__(self, share: float, seed: int | None = None) -> None:
        self._share, self._random = share, random.Random(seed)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shadow", initializer=_lowest_priority)
        self._busy = threading.Lock()
        self.wanted = self.found = self.queries = 0

    def watch(self, index: AudioIndex, queries: np.ndarray, k: int, scores: np.ndarray) -> None:
        """Perhaps look at a search: unit queries float32[Q, dim] and the scores float32[Q, k] of what they found."""
        if index.spec.kind == "flat" or self._random.random() >= self._share or not self._busy.acquire(blocking=False):
            return
        self._pool.submit(self._compare, index, queries[:1].copy(), k, scores[:1].copy())

    def _compare(self, index: AudioIndex, queries: np.ndarray, k: int, scores: np.ndarray) -> None:
        try:
            exact = index.search_exactly(queries, k).scores
            threshold = exact[exact > -np.inf].min(initial=np.inf)
            wanted = int(np.count_nonzero(exact > -np.inf))
            self.found += min(wanted, int(np.count_nonzero(scores >= threshold - TIE)))
            self.wanted += wanted
            self.queries += 1
        finally:
            self._busy.release()


def _lowest_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def describe(calibration: Calibration | None) -> dict[str, Any]:
    """What /release says of the probabilities."""
    error = None if calibration is None else round(calibration.error, 4)
    return {"calibrated": calibration is not None, "calibration_error": error}
