"""Vectors to row numbers over the segments of a release: one coarse search, every segment scanned, exact rescoring.

Rows are numbered through: those of the first segment, then those of the second, and so on. Scores are the inner
product with the stored float16 vector whatever the index is.

A filtered search is planned by cost. Few matches: their vectors are gathered and compared exactly. Otherwise the
lists that hold matches are probed, the most promising first, until those not looked at are not expected to hold one
of the k best: how similar a list's rows may be to a query follows from its centroid and its shape (`Promise`).
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audiomae.search.index import INDEX_FILE, OldQuantiser, Quantiser, Ranked, Selection
from audiomae.search.scanning import Allowed, Outline, Scanner, Scans, best, open_segments, top
from audiomae.search.spec import IndexSpec

EXACT_ROW_COST = 12  # gathering and comparing one row exactly, in scanned codes
EXACT_MAX_ROWS = 20_000  # so many matches are compared exactly for one query, whatever else
MISSED = 0.01  # of k: hits that may be expected in lists that are not looked at
MISSED_CODES = 0.03  # of the hits: those that may be expected to be lost among candidates
MAX_REFINE = 256  # candidates per hit, at most
CROWD_ROWS = 4000  # from so many rows on more candidates are rescored
CODE_NOISE = 0.9  # of one-bit codes, in units of what a random direction across the centroid gives


@dataclass(frozen=True)
class Chosen:
    """Which rows of one segment may be returned.

    Attributes:
        selection: as bits.
        filtered: whether a filter chose them (else only deletions are left out).
        segment: where they are.
    """

    selection: Selection
    filtered: bool
    segment: Outline

    @functools.cached_property
    def per_list(self) -> np.ndarray:
        """How many of them every list holds, int64[nlist]."""
        sizes = self.segment.sizes
        if self.selection.count == self.segment.num_rows:
            return sizes
        return np.bincount(self.segment.assigned[self.selection.rows], minlength=len(sizes))


@dataclass(frozen=True)
class Promise:
    """How similar the rows of lists may be to queries, as normal distributions.

    A row x of a list with centroid c has x = a c + r, a with the mean and variance of the list. For a query q with
    q c = t, q x has mean t a and variance t^2 var(a) + (1 - t^2) |r|^2 / D, as r points anywhere across c. `caution`
    widens it for what is not normal; a build measures how much is needed.
    """

    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, similar: np.ndarray, lists: np.ndarray, shape: np.ndarray, dim: int, caution: float) -> "Promise":
        """For similarities float32[Q, n] to lists int64[Q, n]."""
        mean, variance = shape[0][lists], shape[1][lists]
        across = np.maximum(1 - mean**2 - variance, 0.02)
        spread = np.sqrt(similar**2 * variance + (1 - similar**2).clip(0) * across / dim)
        return cls(similar * mean, caution * spread)

    def expected(self, counts: np.ndarray, score: np.ndarray) -> np.ndarray:
        """How many of `counts` rows in each list are expected above `score` float32[Q, 1]."""
        return counts * _upper_tail((score - self.mean) / self.spread)


def _upper_tail(z: np.ndarray) -> np.ndarray:
    """The share of a normal distribution above z, to 1e-3 of itself (Abramowitz and Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * series
    return np.where(z >= 0, tail, 1 - tail)


class Searcher:
    """All segments of a release as one. Safe to call from several threads.

    Args:
        segments: in the order of their rows.
        scanner: where their vectors lie.
        spec: what they are and how they are searched.
        quantiser: their own, for inverted lists.
        dim: the length of a vector.
    """

    def __init__(
        self, segments: Sequence[Outline], scanner: Scans, spec: IndexSpec, quantiser: Quantiser | None, dim: int
    ) -> None:
        self.segments, self.scanner, self.spec, self.quantiser, self.dim = list(segments), scanner, spec, quantiser, dim
        self.starts = np.cumsum([0, *(segment.num_rows for segment in segments)])
        self.num_rows = int(self.starts[-1])

    @classmethod
    def open(cls, directories: Sequence[Path], trained: Path | None, spec: IndexSpec) -> "Searcher":
        """Open segments whose files were checked; `trained` is the directory of their quantiser."""
        quantiser = open_quantiser(directories, trained, spec)
        pieces = open_segments(directories, quantiser, spec.kind)
        dim = pieces[0].segment.dim
        return cls([piece.segment for piece in pieces], Scanner(pieces, dim), spec, quantiser, dim)

    def afresh(self) -> "Searcher":
        """The same for one search: `missing` is then of that search alone."""
        other = copy.copy(self)
        other.scanner = self.scanner.afresh()
        return other

    @property
    def missing(self) -> list[str]:
        """Names of the shards that did not answer."""
        return sorted(self.scanner.missing)

    def choose(self, mask: np.ndarray, filtered: bool = True) -> list[Chosen]:
        """The rows that a search may return, given as bool[N], for `search`."""
        pieces = zip(self.segments, self.starts[:-1], self.starts[1:], strict=True)
        return [Chosen(Selection.of(mask[start:stop]), filtered, segment) for segment, start, stop in pieces]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        chosen: list[Chosen] | None = None,
        spec: IndexSpec | None = None,
    ) -> Ranked:
        """The k best rows of each query by inner product, best first.

        Args:
            queries: float32[Q, D], unit length.
            k: how many.
            chosen: only these rows, from `choose`; None for all.
            spec: search settings other than the index's own (for tuning).

        Returns:
            scores float32[Q, k] and rows int64[Q, k]; where there are fewer, row -1 with score -inf.
        """
        spec = spec or self.spec
        count = self.num_rows if chosen is None else sum(part.selection.count for part in chosen)
        if count == 0 or not len(queries):
            return _none(len(queries), k)
        wanted = min(k, count)
        filtered = chosen is not None and chosen[0].filtered
        if spec.kind == "flat" or (filtered and self._is_exact_cheap(count, wanted, spec)):
            scores, rows = self.scanner.compare(queries, wanted, allowed(chosen))
        elif filtered and chosen is not None and self.quantiser is not None and self.quantiser.shape is not None:
            scores, rows = _Probing(self, queries, wanted, chosen, spec).run()
        else:
            scores, rows = self._search_index(queries, wanted, chosen, spec)
            short = np.flatnonzero((rows < 0).any(axis=1))
            if len(short):  # the lists probed held too few: compare everything
                found = self.scanner.compare(np.ascontiguousarray(queries[short]), wanted, allowed(chosen))
                scores[short], rows[short] = _padded(*found, wanted)
        return _padded(scores, rows, k)

    def _is_exact_cheap(self, count: int, k: int, spec: IndexSpec) -> bool:
        if self.quantiser is None or self.quantiser.shape is None or count <= max(EXACT_MAX_ROWS, 8 * k):
            return True
        return count * EXACT_ROW_COST <= self.num_rows * spec.nprobe / max(spec.nlist, 1)

    def _search_index(self, queries: np.ndarray, k: int, chosen: list[Chosen] | None, spec: IndexSpec) -> Ranked:
        count, rows = k * spec.refine, allowed(chosen)
        if self.quantiser is not None:
            similar, lists = self.quantiser.nearest(queries, spec.nprobe)
            found = self.scanner.scan(queries, count, lists, similar, rows)
        else:
            found = self.scanner.walk(queries, count, spec.effort, rows)
        scores, numbers = top(found.scores, k, found.rows, found.scores, found.rows)
        return _padded(scores, numbers, k)


class _Probing:
    """One filtered search by inverted lists: growing numbers of lists, growing numbers of candidates."""

    def __init__(self, searcher: Searcher, queries: np.ndarray, k: int, chosen: list[Chosen], spec: IndexSpec) -> None:
        assert searcher.quantiser is not None and searcher.quantiser.shape is not None
        self.searcher, self.queries, self.k, self.spec, self.allowed = searcher, queries, k, spec, allowed(chosen)
        similar, lists = searcher.quantiser.nearest(queries, searcher.quantiser.nlist)
        per_list = sum((part.per_list for part in chosen), np.zeros(searcher.quantiser.nlist, np.int64))
        counts = per_list[lists]
        promise = Promise.of(similar, lists, searcher.quantiser.shape, searcher.dim, spec.caution)
        # the most promising first: by the score that the best row of a list may have
        reach = promise.mean + promise.spread * np.sqrt(2 * np.log(np.maximum(counts, 1) + 1))
        order = np.argsort(np.where(counts > 0, -reach, np.inf), axis=1)
        self.similar, self.lists, self.counts = (
            np.take_along_axis(values, order, axis=1) for values in (similar, lists, counts)
        )
        self.promise = Promise(*(np.take_along_axis(v, order, axis=1) for v in (promise.mean, promise.spread)))
        across = np.maximum(1 - searcher.quantiser.shape[0] ** 2, 0.02).mean()
        self.noise = CODE_NOISE * float(np.sqrt(across / searcher.dim))

    def run(self) -> Ranked:
        """Scores float32[Q, k] and rows int64[Q, k]."""
        shape = (len(self.queries), self.k)
        scores, rows = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        done = np.zeros(len(self.queries), np.int64)  # lists looked at, of each query
        # first as many lists as hold several times k matches
        until = 1 + np.argmax(np.cumsum(self.counts, axis=1) >= 8 * self.k, axis=1)
        until = np.maximum(until, min(self.spec.nprobe, self.counts.shape[1]))
        until = np.minimum(until, np.count_nonzero(self.counts, axis=1))
        active = np.flatnonzero(until > done)
        while len(active):
            found = self._probe(active, done[active], until[active])
            joined = best([(scores[active], rows[active]), found], self.k, len(active))
            scores[active], rows[active] = joined
            done[active] = until[active]
            until[active] = self._until(active, scores[active, -1:])
            active = active[until[active] > done[active]]
        return scores, rows

    def _until(self, active: np.ndarray, last: np.ndarray) -> np.ndarray:
        """How many lists have to be looked at, given the k-th score found so far."""
        promise = Promise(self.promise.mean[active], self.promise.spread[active])
        counts = self.counts[active]
        expected = promise.expected(counts, last)
        expected = np.where(counts > 0, expected, 0.0)
        remaining = np.cumsum(expected[:, ::-1], axis=1)[:, ::-1]  # in this list and those after it
        return np.count_nonzero(remaining > MISSED * self.k, axis=1)

    def _probe(self, active: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Ranked:
        """The k best rows in some lists of each query."""
        width = int((stop - start).max())
        places = start[:, None] + np.arange(width)
        inside = places < stop[:, None]
        places = np.minimum(places, self.lists.shape[1] - 1)
        lists = np.where(inside, np.take_along_axis(self.lists[active], places, axis=1), -1)
        similar = np.take_along_axis(self.similar[active], places, axis=1)
        queries = np.ascontiguousarray(self.queries[active])
        limit = int(np.where(inside, np.take_along_axis(self.counts[active], places, axis=1), 0).sum(axis=1).max())
        # the more rows there are, the more of them look as good as the best by their codes alone
        count = round(self.k * max(self.spec.refine, 4) * max(1.0, math.sqrt(limit / CROWD_ROWS)))
        while True:
            count = min(count, limit)
            found = self.searcher.scanner.scan(queries, count, lists, similar, self.allowed)
            scores, rows = top(found.scores, min(self.k, count), found.rows, found.scores, found.rows)
            if found.rows.shape[1] < count:
                return _padded(scores, rows, self.k)
            # of each hit's equals, by their codes
            missed = _upper_tail((scores - found.approximate[:, -1:]) / self.noise)
            short = (np.where(found.rows[:, -1:] >= 0, missed, 0).mean(axis=1) > MISSED_CODES).any()
            if count >= limit or count >= MAX_REFINE * self.k or not short:
                return _padded(scores, rows, self.k)
            count *= 4


def allowed(chosen: Sequence[Chosen] | None) -> Allowed:
    """What `choose` gave, as scanners take it."""
    return None if chosen is None else [part.selection for part in chosen]


def open_quantiser(directories: Sequence[Path], trained: Path | None, spec: IndexSpec) -> Quantiser | None:
    """The quantiser of a release, where it has one; `trained` is its directory."""
    if trained is not None:
        return Quantiser(trained)
    return OldQuantiser(directories[0] / INDEX_FILE) if spec.kind == "ivf" else None


def _none(count: int, k: int) -> Ranked:
    return np.full((count, k), -np.inf, np.float32), np.full((count, k), -1, np.int64)


def _padded(scores: np.ndarray, rows: np.ndarray, k: int) -> Ranked:
    missing = k - rows.shape[1]
    if missing <= 0:
        return scores, rows
    return (
        np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf),
        np.pad(rows, ((0, 0), (0, missing)), constant_values=-1),
    )
