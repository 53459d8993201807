"""Vectors to row numbers over the segments of a release: one coarse search, every segment scanned, exact rescoring.

Rows are numbered through: those of the first segment, then those of the second, and so on. Scores are the inner
product with the stored float16 vector whatever the index is.

A filtered search is planned by cost: either all matches are gathered and compared exactly, or the lists that hold some
are probed (`audiomae.search.probing`).
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audiomae.search.index import INDEX_FILE, OldQuantiser, Quantiser, Ranked, Selection
from audiomae.search.probing import Probing, is_exact_cheaper
from audiomae.search.scanning import (
    Allowed,
    Outline,
    Probe,
    Scanner,
    Scans,
    StoredSegment,
    best,
    none,
    open_segments,
    padded,
    top,
)
from audiomae.search.spec import IndexSpec


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
        self._alone = segments[0].refined if len(segments) == 1 and isinstance(segments[0], StoredSegment) else None

    @classmethod
    def open(cls, directories: Sequence[Path], trained: Path | None, spec: IndexSpec) -> "Searcher":
        """Open segments whose files were checked; `trained` is the directory of their quantiser."""
        quantiser = open_quantiser(directories, trained, spec)
        pieces = open_segments(directories, quantiser, spec.kind)
        dim = pieces[0].segment.dim
        return cls([piece.segment for piece in pieces], Scanner(pieces, dim), spec, quantiser, dim)

    def afresh(self) -> "Searcher":
        """The same for one search: `missing` is then of that search alone."""
        scanner = self.scanner.afresh()
        if scanner is self.scanner:
            return self
        other = copy.copy(self)
        other.scanner = scanner
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
            return none(len(queries), k)
        wanted = min(k, count)
        filtered = chosen is not None and chosen[0].filtered
        if spec.kind == "flat":
            scores, rows = self.scanner.compare(queries, wanted, allowed(chosen))
        elif filtered and chosen is not None:
            scores, rows = self._search_filtered(queries, wanted, chosen, spec)
        else:
            scores, rows = self._search_index(queries, wanted, chosen, spec)
            if rows[:, -1].min() < 0:  # the lists probed held too few: compare everything
                short = np.flatnonzero(rows[:, -1] < 0)
                found = self.scanner.compare(np.ascontiguousarray(queries[short]), wanted, allowed(chosen))
                scores[short], rows[short] = padded(*found, wanted)
        return padded(scores, rows, k)

    def _search_filtered(self, queries: np.ndarray, k: int, chosen: list[Chosen], spec: IndexSpec) -> Ranked:
        quantiser, count = self.quantiser, sum(part.selection.count for part in chosen)
        if quantiser is None or quantiser.shape is None:  # a graph, or of an older version
            return self.scanner.compare(queries, k, allowed(chosen))
        matches = np.sum([part.per_list for part in chosen], axis=0)
        if is_exact_cheaper(count, k, len(queries), matches, self._list_sizes):
            return self.scanner.compare(queries, k, allowed(chosen))
        return Probing(quantiser, matches, self.scanner, allowed(chosen), spec).search(queries, k)

    @functools.cached_property
    def _list_sizes(self) -> np.ndarray:
        """How many rows every list holds in all segments, int64[nlist]."""
        sizes: np.ndarray = np.sum([segment.sizes for segment in self.segments], axis=0)
        return sizes

    def _search_index(self, queries: np.ndarray, k: int, chosen: list[Chosen] | None, spec: IndexSpec) -> Ranked:
        count, rows = k * spec.refine, allowed(chosen)
        if self._alone is not None:
            selection = None if chosen is None else chosen[0].selection
            found = self._alone.search(queries, min(count, self.num_rows), spec.nprobe, selection)
            return _first(found, k)
        if self.quantiser is not None:
            similar, lists = self.quantiser.nearest(queries, spec.nprobe)
            candidates = self.scanner.scan(queries, count, Probe(lists, similar), rows)
        else:
            candidates = self.scanner.walk(queries, count, spec.effort, rows)
        scores, numbers = top(candidates.scores, k, candidates.rows, candidates.scores, candidates.rows)
        return padded(scores, numbers, k)


def _first(ranked: Ranked, k: int) -> Ranked:
    """The k best of a ranking by FAISS, which leaves the order of equal scores open: of equals the lower row."""
    scores, rows = ranked
    following = scores[:, 1 : k + 1]
    if (following < scores[:, : following.shape[1]]).all() and rows[:, :k].min() >= 0:
        return scores[:, :k], rows[:, :k]
    return best([ranked], k, len(scores))


def allowed(chosen: Sequence[Chosen] | None) -> Allowed:
    """What `choose` gave, as scanners take it."""
    return None if chosen is None else [part.selection for part in chosen]


def open_quantiser(directories: Sequence[Path], trained: Path | None, spec: IndexSpec) -> Quantiser | None:
    """The quantiser of a release, where it has one; `trained` is its directory."""
    if trained is not None:
        return Quantiser(trained)
    return OldQuantiser(directories[0] / INDEX_FILE) if spec.kind == "ivf" else None
