"""What is done where the vectors of a release lie: lists scanned, graphs walked, rows compared.

A `Scanner` holds segments, whole or in part, in this process. `audiomae.search.searcher` decides what is looked at and
takes the best of it; `audiomae.search.sharded` lets several scanners, of other processes, stand for one. Rows are those
of the release, numbered through.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from audiomae.errors import IntegrityError
from audiomae.search.index import (
    ASSIGN_FILE,
    INDEX_FILE,
    LAYOUT_FILE,
    LISTS_FILE,
    VECTORS_FILE,
    Graph,
    Lists,
    OldLists,
    OldQuantiser,
    Quantiser,
    Ranked,
    Refined,
    RowStore,
    Selection,
)

# the rows that may be found, of every segment of the release by its number; None: all
Allowed = Sequence[Selection] | Mapping[int, Selection] | None
WHOLE = (0, 1)
FIRST_SIFTED = 16  # rows compared exactly for each hit wanted, before it is seen how many more may be hits


class Candidates(NamedTuple):
    """Rows int64[Q, n] (-1 for none) with their scores by their codes and by their stored vectors, float32[Q, n]."""

    approximate: np.ndarray
    rows: np.ndarray
    scores: np.ndarray


class Probe(NamedTuple):
    """Numbers of lists to scan int64[Q, n] (-1 for none) and their similarity to the queries float32[Q, n]."""

    lists: np.ndarray
    similar: np.ndarray


class Sieve(NamedTuple):
    """Which rows may be among the k best although their codes say less.

    Attributes:
        last: the k-th score found before, which they have to beat, float32[Q, 1]; -inf for none.
        margin: how much worse than it is a row may look by its code, float32[Q, 1].
        most: how many rows are looked at, at most.
    """

    last: np.ndarray
    margin: np.ndarray
    most: int


class Scans(Protocol):
    """What a search asks for, of a scanner here or of several elsewhere.

    Attributes:
        missing: names of those that did not answer.
    """

    missing: set[str]

    def afresh(self) -> "Scans":
        """The same for one search, with nothing missing yet."""

    def scan(self, queries: np.ndarray, count: int, probe: Probe, allowed: Allowed) -> Candidates:
        """The `count` best rows in some lists by their codes."""

    def sift(self, queries: np.ndarray, k: int, probe: Probe, sieve: Sieve, allowed: Allowed) -> Ranked:
        """The k best rows in some lists: those that look best compared exactly, as far down as one may be a hit."""

    def walk(self, queries: np.ndarray, count: int, effort: int, allowed: Allowed) -> Candidates:
        """The `count` best rows that walks through the segments' graphs come by."""

    def compare(self, queries: np.ndarray, k: int, allowed: Allowed) -> Ranked:
        """The k best of all rows, each compared exactly."""

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Stored vectors of some rows, float32[n, D]."""


class Outline:
    """What a plan must know of a segment.

    Args:
        directory: its files, checked already; those with vectors or codes are not looked at.
        num_rows: how many rows it has.
    """

    def __init__(self, directory: Path, num_rows: int) -> None:
        self.directory, self.num_rows = directory, num_rows

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """How many rows every list has, int64[nlist]."""
        layout: np.ndarray = np.load(self.directory / LAYOUT_FILE)
        return layout[:, 0].astype(np.int64)

    @functools.cached_property
    def assigned(self) -> np.ndarray:
        """The list of every row, int[N], mapped."""
        lists: np.ndarray = np.load(self.directory / ASSIGN_FILE, mmap_mode="r")
        return lists


class StoredSegment(Outline):
    """A segment that is searched here, or a part of it.

    Args:
        directory: its files, checked already.
        quantiser: the release's, for inverted lists.
        kind: what stands before the row store.
        part: the share of its lists, and of its rows in exact comparisons: (number, of how many).
    """

    def __init__(self, directory: Path, quantiser: Quantiser | None, kind: str, part: tuple[int, int] = WHOLE) -> None:
        self.store = RowStore(directory / VECTORS_FILE)
        super().__init__(directory, self.store.num_rows)
        self.dim, self._part = self.store.dim, part
        self.between = self.num_rows * part[0] // part[1], self.num_rows * (part[0] + 1) // part[1]
        self.lists: Lists | None = None
        if kind == "ivf" and quantiser is not None:
            if isinstance(quantiser, OldQuantiser):
                self.lists = OldLists(quantiser)
            else:
                self.lists = Lists(quantiser, directory, part)
        self.refined = Refined(self.lists, self.store) if self.lists is not None and part == WHOLE else None
        self.graph = Graph(directory / INDEX_FILE) if kind == "hnsw" else None
        if self.lists is not None:
            self.sizes = self.lists.sizes
            if int(self.sizes.sum()) != self.num_rows:
                raise IntegrityError(
                    f"{directory}: {LISTS_FILE} holds {int(self.sizes.sum())} rows, the row store {self.num_rows}: "
                    "build the index again"
                )

    def compare(self, queries: np.ndarray, k: int, selection: Selection | None) -> Ranked:
        """The k best rows of this part, exactly; fewer columns where it has fewer."""
        start, stop = self.between
        if selection is not None:
            edges = np.searchsorted(selection.rows, self.between)
            mine = selection.rows[edges[0] : edges[1]]
            return self.store.search_rows(queries, min(k, len(mine)), mine) if len(mine) else nothing(len(queries))
        if start == stop:
            return nothing(len(queries))
        return self.store.search(queries, min(k, stop - start), None if self._part == WHOLE else self.between)


@dataclass(frozen=True)
class Piece:
    """A segment in its release: its number there, and the number of its first row."""

    number: int
    start: int
    segment: StoredSegment

    def selection(self, allowed: Allowed) -> Selection | None:
        """What of the segment may be found; None for all of it."""
        mine = None if allowed is None else allowed[self.number]
        return None if mine is None or mine.count == self.segment.num_rows else mine

    def of_release(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the segment as rows of the release; -1 stays."""
        return np.where(rows < 0, -1, rows + self.start) if self.start else rows


class Scanner:
    """Segments, or parts of them, in this process. Safe to call from several threads.

    Args:
        pieces: in the order of their rows.
        dim: the length of a vector.
    """

    def __init__(self, pieces: Sequence[Piece], dim: int) -> None:
        self.pieces, self.dim = list(pieces), dim
        self.missing: set[str] = set()
        self._starts = np.array([piece.start for piece in pieces])

    def afresh(self) -> "Scanner":
        """As `Scans.afresh`: nothing can be missing."""
        return self

    def scan(self, queries: np.ndarray, count: int, probe: Probe, allowed: Allowed) -> Candidates:
        """As `Scans.scan`."""
        found = []
        for piece, selection in self._pieces(allowed):
            assert piece.segment.lists is not None
            most = min(count, piece.segment.num_rows)
            scores, rows = piece.segment.lists.scan(queries, most, *probe, selection)
            found.append((scores, piece.of_release(rows)))
        return self._candidates(queries, found, count)

    def sift(self, queries: np.ndarray, k: int, probe: Probe, sieve: Sieve, allowed: Allowed) -> Ranked:
        """As `Scans.sift`."""
        found = []
        for piece, selection in self._pieces(allowed):
            assert piece.segment.lists is not None
            most = min(sieve.most, piece.segment.num_rows)
            approximate, rows = piece.segment.lists.scan(queries, most, *probe, selection)
            scores, numbers = none(len(queries), k)
            for query in range(len(queries)):
                one = slice(query, query + 1)
                left = rows[query][rows[query] >= 0]  # the best come first
                limits = float(sieve.last[query, 0]), float(sieve.margin[query, 0])
                sifted = _sift(piece.segment.store, queries[one], k, (approximate[query], left), limits)
                scores[one], numbers[one] = padded(*sifted, k)
            found.append((scores, piece.of_release(numbers)))
        return best(found, k, len(queries))

    def walk(self, queries: np.ndarray, count: int, effort: int, allowed: Allowed) -> Candidates:
        """As `Scans.walk`."""
        found = []
        for piece, selection in self._pieces(allowed):
            assert piece.segment.graph is not None
            most = min(count, piece.segment.num_rows)
            scores, rows = piece.segment.graph.search(queries, most, effort, selection)
            found.append((scores, piece.of_release(rows)))
        return self._candidates(queries, found, count)

    def compare(self, queries: np.ndarray, k: int, allowed: Allowed) -> Ranked:
        """As `Scans.compare`."""
        found = []
        for piece, selection in self._pieces(allowed):
            scores, rows = piece.segment.compare(queries, k, selection)
            found.append((scores, piece.of_release(rows)))
        return best(found, k, len(queries))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """As `Scans.vectors`; the segments of these rows must be among the pieces."""
        rows = np.maximum(rows, 0)  # -1 stands for no row
        if len(self.pieces) == 1:
            return self.pieces[0].segment.store.vectors(rows - self.pieces[0].start)
        found = np.empty((len(rows), self.dim), np.float32)
        numbers = np.maximum(np.searchsorted(self._starts, rows, side="right") - 1, 0)
        for number in np.unique(numbers):
            piece, mine = self.pieces[number], numbers == number
            found[mine] = piece.segment.store.vectors(np.maximum(rows[mine] - piece.start, 0))
        return found

    def _pieces(self, allowed: Allowed) -> list[tuple[Piece, Selection | None]]:
        """Those in which anything may be found."""
        pairs = [(piece, piece.selection(allowed)) for piece in self.pieces]
        return [(piece, selection) for piece, selection in pairs if selection is None or selection.count]

    def _candidates(self, queries: np.ndarray, found: Sequence[Ranked], count: int) -> Candidates:
        approximate, rows = found[0] if len(found) == 1 else best(found, count, len(queries))
        scores = np.full(rows.shape, -np.inf, np.float32)
        for piece in self.pieces:
            mine = (rows >= piece.start) & (rows < piece.start + piece.segment.num_rows)
            for query in range(len(queries)):
                if mine[query].any():
                    store, one = piece.segment.store, queries[query : query + 1]
                    scores[query, mine[query]] = store.scores(one, rows[query, mine[query]] - piece.start)
        return Candidates(np.where(rows < 0, np.float32(-np.inf), approximate), rows, scores)


def _sift(
    store: RowStore, query: np.ndarray, k: int, found: tuple[np.ndarray, np.ndarray], limits: tuple[float, float]
) -> Ranked:
    """The k best of rows int64[n] that come in the order of their approximate scores, each compared exactly.

    They are compared in growing numbers, until the next one is more than a margin below the k-th score so far.
    """
    (approximate, rows), (last, margin) = found, limits
    ranked = nothing(1)
    done, until = 0, min(len(rows), FIRST_SIFTED * k)
    while done < until:
        mine = np.sort(rows[done:until])
        ranked = best([ranked, store.search_rows(query, min(k, len(mine)), mine)], k, 1)
        done = until
        to_beat = max(last, float(ranked[0][0, -1]) if ranked[0].shape[1] == k else -np.inf) - margin
        until = min(int(np.searchsorted(-approximate[: len(rows)], -to_beat, side="right")), 4 * done)
    return ranked


def best(found: Sequence[Ranked], k: int, queries: int) -> Ranked:
    """The k best of several rankings, rows -1 where there are none: float32[Q, k], int64[Q, k], or fewer columns."""
    if not found:
        return nothing(queries)
    if len(found) == 1:
        scores, rows = found[0]
        if rows.size and rows.min() < 0:
            scores = np.where(rows < 0, np.float32(-np.inf), scores)
    else:
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        rows = np.concatenate([rows for _, rows in found], axis=1)
        scores[rows < 0] = -np.inf
    highest, numbers = top(scores, k, rows, scores, rows)
    return highest, numbers


def nothing(queries: int) -> Ranked:
    """A ranking without columns."""
    return np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)


def top(by: np.ndarray, k: int, rows: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of several arrays [Q, n] the k columns in which `by` is highest; of equals the lower row comes first."""
    if len(by) == 1:  # what take_along_axis does, in a tenth of its time
        order = np.lexsort((rows[0], -by[0]))[:k]
        return tuple(column[:, order] for column in columns)
    order = np.lexsort((rows, -by), axis=1)[:, :k]
    return tuple(np.take_along_axis(column, order, axis=1) for column in columns)


def open_segments(directories: Sequence[Path], quantiser: Quantiser | None, kind: str) -> list[Piece]:
    """All segments of a release, whole."""
    segments = [StoredSegment(directory, quantiser, kind) for directory in directories]
    starts = np.cumsum([0, *(segment.num_rows for segment in segments)])
    return [Piece(number, int(starts[number]), segment) for number, segment in enumerate(segments)]


def none(count: int, k: int) -> Ranked:
    """The rankings of `count` queries that found nothing, padded to k places."""
    return np.full((count, k), -np.inf, np.float32), np.full((count, k), -1, np.int64)


def padded(scores: np.ndarray, rows: np.ndarray, k: int) -> Ranked:
    """Rankings of at least k places, with row -1 and score -inf where there are no more."""
    missing = k - rows.shape[1]
    if missing <= 0:
        return scores, rows
    return (
        np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf),
        np.pad(rows, ((0, 0), (0, missing)), constant_values=-1),
    )
