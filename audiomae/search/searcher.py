"""Vectors to row numbers over the segments of a release: one coarse search, every segment scanned, exact rescoring.

Rows are numbered through: those of the first segment, then those of the second, and so on. Scores are the inner
product with the stored float16 vector whatever the index is.

A filtered search is planned by cost. Few matches: their vectors are gathered and compared exactly. Otherwise the
lists that hold matches are probed, the most promising first, until those not looked at are not expected to hold one
of the k best: how similar a list's rows may be to a query follows from its centroid and its shape (`Promise`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audiomae.errors import IntegrityError
from audiomae.search.index import (
    ASSIGN_FILE,
    INDEX_FILE,
    LISTS_FILE,
    VECTORS_FILE,
    Graph,
    Lists,
    OldLists,
    OldQuantiser,
    Quantiser,
    RowStore,
    Selection,
)
from audiomae.search.spec import IndexSpec

EXACT_ROW_COST = 12  # gathering and comparing one row exactly, in scanned codes
EXACT_MAX_ROWS = 20_000  # so many matches are compared exactly for one query, whatever else
MISSED = 0.01  # of k: hits that may be expected in lists that are not looked at
MISSED_CODES = 0.03  # of the hits: those that may be expected to be lost among candidates
Nearest = tuple[np.ndarray, np.ndarray]  # similarities float32[Q, n] and numbers int64[Q, n] of lists
MAX_REFINE = 256  # candidates per hit, at most
CROWD_ROWS = 4000  # from so many rows on more candidates are rescored
CODE_NOISE = 0.9  # of one-bit codes, in units of what a random direction across the centroid gives


class Segment:
    """The vectors and lists of one segment.

    Args:
        directory: its files, checked already.
        quantiser: the release's, for inverted lists.
        kind: what stands before the row store.
    """

    def __init__(self, directory: Path, quantiser: Quantiser | None, kind: str) -> None:
        self.directory = directory
        self.store = RowStore(directory / VECTORS_FILE)
        self.num_rows, self.dim = self.store.num_rows, self.store.dim
        self.lists: Lists | None = None
        if kind == "ivf" and quantiser is not None:
            if isinstance(quantiser, OldQuantiser):
                self.lists = OldLists(quantiser)
            else:
                self.lists = Lists(quantiser, directory)
        self.graph = Graph(directory / INDEX_FILE) if kind == "hnsw" else None
        if self.lists is not None and int(self.lists.sizes.sum()) != self.num_rows:
            raise IntegrityError(
                f"{directory}: {LISTS_FILE} holds {int(self.lists.sizes.sum())} rows, the row store {self.num_rows}: "
                "build the index again"
            )

    @functools.cached_property
    def assigned(self) -> np.ndarray:
        """The list of every row, int[N], mapped."""
        lists: np.ndarray = np.load(self.directory / ASSIGN_FILE, mmap_mode="r")
        return lists


@dataclass(frozen=True)
class Chosen:
    """Which rows of one segment may be returned.

    Attributes:
        selection: as bits.
        rows: int64[n], their numbers in ascending order.
        filtered: whether a filter chose them (else only deletions are left out).
    """

    selection: Selection
    filtered: bool
    segment: Segment

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Their numbers in ascending order, int64[n]."""
        return np.flatnonzero(self.selection.mask(self.segment.num_rows))

    @functools.cached_property
    def per_list(self) -> np.ndarray:
        """How many of them every list holds, int64[nlist]."""
        assert self.segment.lists is not None
        nlist = len(self.segment.lists.sizes)
        if self.selection.count == self.segment.num_rows:
            return self.segment.lists.sizes
        return np.bincount(self.segment.assigned[self.rows], minlength=nlist)


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
        spec: what they are and how they are searched.
        quantiser: their own, for inverted lists.
    """

    def __init__(self, segments: Sequence[Segment], spec: IndexSpec, quantiser: Quantiser | None) -> None:
        self.segments, self.spec, self.quantiser = list(segments), spec, quantiser
        self.starts = np.cumsum([0, *(segment.num_rows for segment in segments)])
        self.num_rows, self.dim = int(self.starts[-1]), segments[0].dim

    @classmethod
    def open(cls, directories: Sequence[Path], trained: Path | None, spec: IndexSpec) -> "Searcher":
        """Open segments whose files were checked; `trained` is the directory of their quantiser."""
        quantiser = Quantiser(trained) if trained is not None else None
        if quantiser is None and spec.kind == "ivf":
            quantiser = OldQuantiser(directories[0] / INDEX_FILE)
        return cls([Segment(directory, quantiser, spec.kind) for directory in directories], spec, quantiser)

    def choose(self, mask: np.ndarray, filtered: bool = True) -> list[Chosen]:
        """The rows that a search may return, given as bool[N], for `search`."""
        pieces = zip(self.segments, self.starts[:-1], self.starts[1:], strict=True)
        return [Chosen(Selection.of(mask[start:stop]), filtered, segment) for segment, start, stop in pieces]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Stored vectors of some rows, float32[n, D]."""
        if len(self.segments) == 1:
            return self.segments[0].store.vectors(rows)
        found = np.empty((len(rows), self.dim), np.float32)
        rows = np.maximum(rows, 0)  # -1 stands for no row
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers):
            mine = numbers == number
            found[mine] = self.segments[number].store.vectors(rows[mine] - self.starts[number])
        return found

    def search(
        self,
        queries: np.ndarray,
        k: int,
        chosen: list[Chosen] | None = None,
        spec: IndexSpec | None = None,
        nearest: Nearest | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query by inner product, best first.

        Args:
            queries: float32[Q, D], unit length.
            k: how many.
            chosen: only these rows, from `choose`; None for all.
            spec: search settings other than the index's own (for tuning).
            nearest: the lists to scan, where they were found before (for one of several shards).

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
            scores, rows = self._search_exactly(queries, wanted, chosen)
        elif filtered and chosen is not None and self.quantiser is not None and self.quantiser.shape is not None:
            scores, rows = _Probing(self, queries, wanted, chosen, spec).run()
        else:
            scores, rows = self._search_index(queries, wanted, chosen, spec, nearest)
            short = np.flatnonzero((rows < 0).any(axis=1))
            if len(short):  # the lists probed held too few: compare everything
                scores[short], rows[short] = self._search_exactly(queries[short], wanted, chosen)
        return _padded(scores, rows, k)

    def _is_exact_cheap(self, count: int, k: int, spec: IndexSpec) -> bool:
        if self.quantiser is None or self.quantiser.shape is None or count <= max(EXACT_MAX_ROWS, 8 * k):
            return True
        return count * EXACT_ROW_COST <= self.num_rows * spec.nprobe / max(spec.nlist, 1)

    def _search_exactly(
        self, queries: np.ndarray, k: int, chosen: list[Chosen] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for number, segment in enumerate(self.segments):
            if chosen is None or chosen[number].selection.count == segment.num_rows:
                scores, rows = segment.store.search(queries, min(k, segment.num_rows))
            elif chosen[number].selection.count == 0:
                continue
            else:
                mine = chosen[number].rows
                scores, rows = segment.store.search_rows(queries, min(k, len(mine)), mine)
            found.append((scores, np.where(rows < 0, -1, rows + self.starts[number])))
        return best(found, k)

    def _search_index(
        self, queries: np.ndarray, k: int, chosen: list[Chosen] | None, spec: IndexSpec, nearest: Nearest | None
    ) -> tuple[np.ndarray, np.ndarray]:
        candidates = k * spec.refine
        if nearest is None and self.quantiser is not None:
            nearest = self.quantiser.nearest(queries, spec.nprobe)
        found = []
        for number, segment in enumerate(self.segments):
            selection = None if chosen is None else chosen[number].selection
            if selection is not None and selection.count == segment.num_rows:
                selection = None
            count = min(candidates, segment.num_rows)
            if segment.lists is not None and nearest is not None:
                scores, rows = segment.lists.scan(queries, count, nearest[1], nearest[0], selection)
            else:
                assert segment.graph is not None
                scores, rows = segment.graph.search(queries, count, spec.effort, selection)
            if number:
                rows[rows >= 0] += self.starts[number]
            found.append((scores, rows))
        if len(found) == 1:
            return self.rescore(queries, found[0][1], k)
        return self.rescore(queries, best(found, candidates)[1], k)

    def rescore(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of candidate rows int64[Q, n] (-1 for none), by their stored vectors."""
        vectors = self.vectors(rows.ravel()).reshape(*rows.shape, self.dim)
        scores = np.matmul(vectors, queries[:, :, None])[:, :, 0]
        scores[rows < 0] = -np.inf
        return _top(scores, rows, k)


class _Probing:
    """One filtered search by inverted lists: growing numbers of lists, growing numbers of candidates."""

    def __init__(self, searcher: Searcher, queries: np.ndarray, k: int, chosen: list[Chosen], spec: IndexSpec) -> None:
        assert searcher.quantiser is not None and searcher.quantiser.shape is not None
        self.searcher, self.queries, self.k, self.chosen, self.spec = searcher, queries, k, chosen, spec
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

    def run(self) -> tuple[np.ndarray, np.ndarray]:
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
            joined = best([(scores[active], rows[active]), found], self.k)
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

    def _probe(self, active: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
            approximate, rows = self._scan(queries, count, lists, similar)
            scores, found = self.searcher.rescore(queries, rows, min(self.k, count))
            missed = _upper_tail((scores - approximate[:, -1:]) / self.noise)  # of each hit's equals, by their codes
            short = (np.where(rows[:, -1:] >= 0, missed, 0).mean(axis=1) > MISSED_CODES).any()
            if count >= limit or count >= MAX_REFINE * self.k or not short:
                return _padded(scores, found, self.k)
            count *= 4

    def _scan(
        self, queries: np.ndarray, count: int, lists: np.ndarray, similar: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for number, segment in enumerate(self.searcher.segments):
            part = self.chosen[number]
            if part.selection.count:
                assert segment.lists is not None
                every = part.selection.count == segment.num_rows
                scores, rows = segment.lists.scan(
                    queries, min(count, segment.num_rows), lists, similar, None if every else part.selection
                )
                found.append((scores, np.where(rows < 0, -1, rows + self.searcher.starts[number])))
        return best(found, count)


def best(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several rankings: (scores[Q, n], rows[Q, n]) each, rows -1 where there are none."""
    scores = np.concatenate([scores for scores, _ in found], axis=1)
    rows = np.concatenate([rows for _, rows in found], axis=1)
    scores[rows < 0] = -np.inf
    return _top(scores, rows, k)


def _top(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order: Any = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return _padded(np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1), k)


def _none(count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((count, k), -np.inf, np.float32), np.full((count, k), -1, np.int64)


def _padded(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    missing = k - rows.shape[1]
    if missing <= 0:
        return scores, rows
    return (
        np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf),
        np.pad(rows, ((0, 0), (0, missing)), constant_values=-1),
    )
