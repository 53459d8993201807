"""What a search found, and how windows become files: one hit per group, with its best row and how many matched."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from audiomae.search.items import ItemsTable

FIRST_FETCH = 4  # rows looked at per group wanted, before looking again for more groups
Find = Callable[[np.ndarray, int, "np.ndarray | None"], tuple[np.ndarray, np.ndarray]]


class Members(NamedTuple):
    """Rows of one group, int64[n], and how near they are, float32[n], best first."""

    rows: np.ndarray
    scores: np.ndarray


class Hits:
    """What a search found, best first.

    Attributes:
        ids: int64[Q, k], -1 where there are fewer than k.
        scores: float32[Q, k], cosine similarity; -inf beside an id of -1.
        rows: int64[Q, k], the rows of the items table; -1 where there are fewer than k.
        windows: int64[Q, k] of a search with `group_by`, else None: how many rows of the hit's group match at least as
            well as the last of the k hits does (all that can be found, when there are fewer than k groups).
        members: those rows, with `group_by`, else None.
        missing: names of the shards that did not answer; what they have is not among the hits.
    """

    def __init__(
        self,
        ids: np.ndarray,
        scores: np.ndarray,
        rows: np.ndarray,
        table: ItemsTable,
        members: "list[list[Members]] | None" = None,
        missing: Sequence[str] = (),
    ) -> None:
        self.ids, self.scores, self.rows, self.members, self.missing = ids, scores, rows, members, tuple(missing)
        self.windows: np.ndarray | None = None
        if members is not None:
            self.windows = np.zeros(rows.shape, np.int64)
            for query, groups in enumerate(members):
                self.windows[query, : len(groups)] = [len(group.rows) for group in groups]
        self._table = table

    @functools.cached_property
    def spans(self) -> list[list[list[dict[str, float]]]]:
        """For each hit of each query the `start_s`, `end_s` and `score` of the windows in `members`, best first."""
        flat = [group for groups in self.members or [] for group in groups]
        if not flat:
            return [[] for _ in self.rows]
        rows = self._table.rows(np.concatenate([group.rows for group in flat]), ["start_s", "end_s"])
        scores = np.minimum(np.concatenate([group.scores for group in flat]), 1.0).tolist()
        spans = iter([{**row, "score": score} for row, score in zip(rows, scores, strict=True)])
        return [[list(itertools.islice(spans, len(group.rows))) for group in groups] for groups in self.members or []]

    @functools.cached_property
    def items(self) -> list[list[dict[str, Any]]]:
        """One list per query with the items-table row of every hit (none for padding), read when first asked for."""
        found = self._table.rows(self.rows[self.rows >= 0])
        edges = np.cumsum([0, *np.count_nonzero(self.rows >= 0, axis=1)])
        return [found[start:stop] for start, stop in itertools.pairwise(edges)]

    def rows_of(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The items table's rows of these numbers, as in `rows`."""
        return self._table.rows(rows)

    def __getstate__(self) -> dict[str, Any]:
        plain = {"ids": self.ids, "scores": self.scores, "rows": self.rows, "windows": self.windows}
        found = {"members": self.members, "missing": self.missing}
        return plain | found | {"items": self.items, "spans": self.spans}


def best_per_group(
    find: Find, queries: np.ndarray, k: int, groups: np.ndarray, without: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[list[Members]]]:
    """The k groups nearest to each query, each by its best row.

    Args:
        find: `find(queries, n, excluded)` gives scores float32[Q, n] and rows int64[Q, n] of the n best rows, padded
            with -1 when there are not so many; rows where `excluded` (bool[N], or None) is set are passed over.
        queries: float32[Q, D].
        k: how many groups.
        groups: int[N], the group of every row.
        without: a group to leave out.

    Returns:
        scores float32[Q, k], rows int64[Q, k] (-1 padded) and the members of each group; see `Hits`.
    """
    shape = (len(queries), k)
    scores, rows = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
    members = []
    fetch = min(FIRST_FETCH * (k + (without is not None)), len(groups))
    first = find(queries, fetch, None)
    for query in range(len(queries)):
        search = functools.partial(find, queries[query : query + 1])
        found = _Groups(search, groups, k, without)
        found.collect(first[0][query], first[1][query])
        count = len(found.heads)
        rows[query, :count], scores[query, :count] = found.heads, found.head_scores
        members.append(found.members())
    return scores, rows, members


class _Groups:
    """The groups found so far for one query."""

    def __init__(self, find: Callable[..., Any], groups: np.ndarray, k: int, without: int | None) -> None:
        self._find, self._groups, self._k, self._without = find, groups, k, without
        self.heads, self.head_scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        self._scores, self._rows = self.head_scores, self.heads
        self._rounds = 0

    def collect(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Take in ranked rows and look for more, past the groups that are known, until there are k or no more."""
        while True:
            self._rounds += 1
            self._take(scores[rows >= 0], rows[rows >= 0])
            if len(self.heads) >= self._k or (rows < 0).any() or len(rows) == len(self._groups):
                break
            known = np.unique(self._groups[self._rows])
            fetch = min(4 * len(rows), len(self._groups))
            excluded = np.isin(self._groups, known)
            found_scores, found_rows = self._find(fetch, excluded)
            scores, rows = found_scores[0], found_rows[0]
        self.heads, self.head_scores = self.heads[: self._k], self.head_scores[: self._k]

    def _take(self, scores: np.ndarray, rows: np.ndarray) -> None:
        self._scores, self._rows = np.concatenate([self._scores, scores]), np.concatenate([self._rows, rows])
        groups = self._groups[rows]
        heads = np.sort(np.unique(groups, return_index=True)[1])
        if self._without is not None:
            heads = heads[groups[heads] != self._without]
        self.heads = np.concatenate([self.heads, rows[heads]])
        self.head_scores = np.concatenate([self.head_scores, scores[heads]])

    def members(self) -> list[Members]:
        """The rows of each group that were found at least as near as the last group."""
        last = self.head_scores[-1] if len(self.heads) == self._k else -np.inf
        if self._rounds > 1:  # rows of groups that later rounds passed over: look at those too
            others = ~np.isin(self._groups, self._groups[self.heads])
            scores, rows = self._find(int(np.count_nonzero(~others)), others)
            self._scores, self._rows = scores[0][rows[0] >= 0], rows[0][rows[0] >= 0]
        near = self._scores >= last
        rows, scores = self._rows[near], self._scores[near]
        groups = self._groups[rows]
        order = np.argsort(groups, kind="stable")
        wanted = self._groups[self.heads]
        starts, stops = (np.searchsorted(groups[order], wanted, side) for side in ("left", "right"))
        found = [order[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return [Members(rows[places], scores[places]) for places in found]
