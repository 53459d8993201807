"""How much of the exact answer an index finds, and the cheapest search settings that find enough of it.

Recall@k here counts a hit as right when it is at least as near as the k-th exact neighbour: clips with equal vectors
(silence, copies of one file) may stand in for one another. A query is itself in the index and never counts as its own
hit; queries come from the ids that training never sees (`audiomae.search.build_steps.held_out`).

Filtered search is measured too: filters that leave from half to one in ten thousand rows, drawn at random or along the
sound (whole neighbourhoods of lists, as a label or a recording site would), each asked for by queries inside and
outside of what it leaves. Exact answers are found block by block, each on whatever node has time. A release keeps some
of them (`Neighbours`), so that after a small change only the new rows are compared.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from audiomae.search import index as ann
from audiomae.search.searcher import Chosen, Searcher
from audiomae.search.segments import IDS_FILE
from audiomae.search.spec import IndexSpec
from audiomae.vectors import widened

K = 10
TIE = 1e-4  # float16 rounding of two equal vectors' similarities
BLOCK_ROWS = 262_144
STEP_ROWS = 32_768
REFINE_STEPS = (1, 2, 4, 8, 16, 32, 64)
EXHAUSTIVE_QUERIES = 20  # asked to see how fast comparing everything would be
PLATEAU = 5e-4  # recall gained by probing twice as many lists, below which the codes are what is missing
SELECTIVITIES = (0.5, 0.1, 0.05, 0.02, 0.01, 0.001)
FILTERED_MEAN, FILTERED_LOW = 0.95, 0.90
NEIGHBOURS_FILE = "neighbours.npz"
KEPT_QUERIES, KEPT = 100, 32  # queries whose exact answers a release keeps, and how many of each
CAUTIONS = (2.0, 3.0, 4.0)  # with less, filters that cut across lists lose what a build does not see


@dataclass(frozen=True)
class Task:
    """What is measured: segments with their rows, the quantiser, settings to start from, how many queries."""

    segments: tuple[str, ...]
    rows: tuple[int, ...]
    quantiser: str
    spec: IndexSpec
    count: int
    filtered: int
    seed: int

    @property
    def starts(self) -> np.ndarray:
        """The first row of every segment, and the number of all rows."""
        return np.cumsum([0, *self.rows])


@dataclass(frozen=True)
class Filter:
    """A filter for measuring: a share of the rows, by a hash of their ids or by whole inverted lists."""

    share: float
    lists: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """How it is related to the sound."""
        return "independent" if self.lists is None else "correlated"

    def mask(self, ids: np.ndarray, assigned: np.ndarray | None) -> np.ndarray:
        """Which rows it leaves, bool[N]."""
        if self.lists is not None:
            assert assigned is not None
            return self.lists[assigned]
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(40)).astype(np.float64) < self.share * 2**24


@dataclass(frozen=True)
class Queries:
    """Rows `own` int64[Q] that are queries, their ids, vectors float32[Q, D]; the first `filtered` ask with filters."""

    own: np.ndarray
    ids: np.ndarray
    vectors: np.ndarray
    filters: tuple[Filter, ...] = ()
    filtered: int = 0


@dataclass(frozen=True)
class Neighbours:
    """Exact answers: which ids are nearest to some queries, as far down as they are known.

    Attributes:
        queries: ids int64[Q].
        ids, scores: int64 and float32[Q, KEPT], best first; -1 and -inf beyond the last that is known.
    """

    queries: np.ndarray
    ids: np.ndarray
    scores: np.ndarray

    def to_bytes(self) -> bytes:
        """As a file of NumPy's."""
        file = io.BytesIO()
        np.savez(file, queries=self.queries, ids=self.ids, scores=self.scores)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Neighbours":
        """What `to_bytes` gave."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(arrays["queries"], arrays["ids"], arrays["scores"])

    def left(self, present: np.ndarray) -> "Neighbours":
        """Without ids that are not among `present`."""
        there = np.isin(self.ids, present)
        return nearest(self.queries, np.where(there, self.ids, -1), np.where(there, self.scores, -np.inf))

    def with_rows(self, new: "Neighbours") -> "Neighbours":
        """With the nearest of rows that were not there: down to the last that is known, as others may follow it."""
        known = np.count_nonzero(self.ids >= 0, axis=1)
        last = self.scores[np.arange(len(known)), np.maximum(known - 1, 0)]
        ids, scores = np.concatenate([self.ids, new.ids], axis=1), np.concatenate([self.scores, new.scores], axis=1)
        beyond = scores < last[:, None]
        return nearest(self.queries, np.where(beyond, -1, ids), np.where(beyond, -np.inf, scores))

    @property
    def best(self) -> np.ndarray:
        """The K best scores float32[Q, K]."""
        return self.scores[:, :K]

    @property
    def is_enough(self) -> bool:
        """Whether half of the queries are left, and K neighbours of each are known."""
        return 2 * len(self.queries) >= KEPT_QUERIES and bool((self.ids[:, K - 1] >= 0).all())


def nearest(queries: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> Neighbours:
    """The best of some candidates of each query: ids int64[Q, n] with scores float32[Q, n]."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :KEPT]
    short = ((0, 0), (0, KEPT - order.shape[1]))
    return Neighbours(
        queries,
        np.pad(np.take_along_axis(ids, order, axis=1), short, constant_values=-1),
        np.pad(np.take_along_axis(scores, order, axis=1), short, constant_values=-np.inf),
    )


class Exact(NamedTuple):
    """Exact answers: the K best scores of every query [Q, K], then [filtered, K] a filter; and neighbours of some."""

    best: list[np.ndarray]
    near: Neighbours


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a segment."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Recall:
    """What was measured: recall@k of `queries` held-out queries at these settings, and what filters leave of it."""

    value: float
    queries: int
    spec: IndexSpec
    k: int = K
    filtered: list[dict[str, Any]] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)
    exhaustive_per_s: float | None = None

    def facts(self) -> dict[str, Any]:
        """For release.json."""
        facts: dict[str, Any] = {"k": self.k, "value": self.value, "queries": self.queries}
        facts |= {"filtered": self.filtered} if self.filtered else {}
        facts |= {"exhaustive_per_s": self.exhaustive_per_s} if self.exhaustive_per_s else {}
        return facts | {"tried": self.tried}


def blocks(task: Task) -> list[Block]:
    """All rows, in blocks that are compared at the same time."""
    return [
        Block(number, start, min(start + BLOCK_ROWS, rows))
        for number, rows in enumerate(task.rows)
        for start in range(0, rows, BLOCK_ROWS)
    ]


def pick_queries(
    task: Task, folders: Sequence[Path], deleted: np.ndarray, held_out: Callable[[np.ndarray], np.ndarray]
) -> Queries:
    """Rows to query with: held-out ones, or any when there are too few of them for a steady figure."""
    ids = np.concatenate([np.load(folder / IDS_FILE, mmap_mode="r") for folder in folders])
    live = np.ones(len(ids), bool)
    live[deleted] = False
    own = choose_queries(live, held_out(ids), task.count, task.seed)
    filters = _filters(task, folders, live) if task.spec.kind == "ivf" and task.filtered else ()
    order = np.random.default_rng(task.seed).permutation(len(own))  # so that the first ones are from everywhere
    own = own[order]
    return Queries(own, ids[own], _vectors(task, folders, own), filters, min(task.filtered, len(own)))


def kept_queries(
    task: Task, folders: Sequence[Path], deleted: np.ndarray, kept: Neighbours
) -> tuple[Queries, Neighbours]:
    """The queries whose answers a release has kept, as rows of its successor, and what is left of these answers.

    Those that are gone are left out of both.
    """
    ids = np.concatenate([np.load(folder / IDS_FILE, mmap_mode="r") for folder in folders])
    wanted = np.union1d(kept.queries, kept.ids)
    rows = np.flatnonzero(wanted[np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)] == ids)
    rows = np.setdiff1d(rows, deleted)
    rows = rows[np.argsort(ids[rows], kind="stable")]
    places = np.minimum(np.searchsorted(ids[rows], kept.queries), max(0, len(rows) - 1))
    there = np.flatnonzero(ids[rows[places]] == kept.queries) if len(rows) else np.zeros(0, np.int64)
    own = rows[places[there]] if len(rows) else np.zeros(0, np.int64)
    left = Neighbours(kept.queries[there], kept.ids[there], kept.scores[there]).left(ids[rows])
    return Queries(own, ids[own], _vectors(task, folders, own)), left


def _vectors(task: Task, folders: Sequence[Path], rows: np.ndarray) -> np.ndarray:
    """Stored vectors float32[n, D] of some rows of the release."""
    stores = [ann.RowStore(folder / ann.VECTORS_FILE) for folder in folders]
    found = np.empty((len(rows), stores[0].dim), np.float32)
    for store, start, stop in zip(stores, task.starts[:-1], task.starts[1:], strict=True):
        mine = np.flatnonzero((rows >= start) & (rows < stop))
        found[mine] = store.vectors(rows[mine] - start)
    return found


def choose_queries(live: np.ndarray, held_out: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows to query with, int64[Q], ascending."""
    candidates = np.flatnonzero(live & held_out)
    if len(candidates) < min(count, 50):
        candidates = np.flatnonzero(live)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(candidates, size=min(count, len(candidates)), replace=False))


def _filters(task: Task, folders: Sequence[Path], live: np.ndarray) -> tuple[Filter, ...]:
    """Of every share one at random and one of neighbouring lists."""
    counts = np.zeros(task.spec.nlist, np.int64)
    for folder in folders:
        counts += np.bincount(np.load(folder / ann.ASSIGN_FILE, mmap_mode="r"), minlength=task.spec.nlist)
    rng = np.random.default_rng(task.seed)
    found = []
    for share in SELECTIVITIES:
        if share * len(live) < 2 * K:
            continue
        found.append(Filter(share))
        order = np.roll(np.arange(task.spec.nlist), -int(rng.integers(task.spec.nlist)))  # near lists come together
        last = int(np.searchsorted(np.cumsum(counts[order]), share * len(live))) + 1
        chosen = np.zeros(task.spec.nlist, bool)
        chosen[order[:last]] = True
        found.append(Filter(share, chosen))
    return tuple(found)


def exact_block(task: Task, folder: Path, deleted: np.ndarray, queries: Queries, block: Block) -> Exact:
    """Exact answers among the rows of a block."""
    start = int(task.starts[block.segment])
    rows = ann.RowStore(folder / ann.VECTORS_FILE).rows
    ids = np.load(folder / IDS_FILE, mmap_mode="r")
    assigned = np.load(folder / ann.ASSIGN_FILE, mmap_mode="r") if task.spec.kind == "ivf" else None
    shapes = [len(queries.own), *([queries.filtered] * len(queries.filters))]
    best = [np.full((count, K), -np.inf, np.float32) for count in shapes]
    asked = queries.ids[:KEPT_QUERIES]
    near = nearest(asked, np.zeros((len(asked), 0), np.int64), np.zeros((len(asked), 0), np.float32))
    for low in range(block.start, block.stop, STEP_ROWS):
        high = min(low + STEP_ROWS, block.stop)
        scores = queries.vectors @ widened(rows[low:high]).T
        dead = deleted[(deleted >= start + low) & (deleted < start + high)] - start - low
        scores[:, dead] = -np.inf
        inside = np.flatnonzero((queries.own >= start + low) & (queries.own < start + high))
        scores[inside, queries.own[inside] - start - low] = -np.inf
        best[0] = _best(best[0], scores)
        near = merged([near, _near(asked, ids[low:high], scores[: len(asked)])])
        for number, filter in enumerate(queries.filters, start=1):
            mask = filter.mask(ids[low:high], None if assigned is None else assigned[low:high])
            best[number] = _best(best[number], scores[: queries.filtered, mask])
    return Exact(best, near)


def _near(queries: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> Neighbours:
    if scores.shape[1] > KEPT:
        places = np.argpartition(scores, scores.shape[1] - KEPT, axis=1)[:, -KEPT:]
        places.sort(axis=1)  # of equal scores the one that comes first, wherever a block ends
        scores = np.take_along_axis(scores, places, axis=1)
        found = ids[places]
    else:
        found = np.broadcast_to(ids, scores.shape)
    return nearest(queries, np.where(np.isfinite(scores), found, -1), scores)


def merged(parts: Sequence[Neighbours]) -> Neighbours:
    """The nearest of all rows, from those of each part."""
    ids, scores = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("ids", "scores"))
    return nearest(parts[0].queries, ids, scores)


def _best(before: np.ndarray, scores: np.ndarray) -> np.ndarray:
    joined = np.concatenate([before, scores], axis=1)
    return np.partition(joined, joined.shape[1] - K, axis=1)[:, -K:]


def join(found: Sequence[Exact]) -> Exact:
    """Exact answers among the rows of all blocks; the best scores descending."""
    parts = zip(*(block.best for block in found), strict=True)
    best = [-np.sort(-np.concatenate(part, axis=1), axis=1)[:, :K] for part in parts]
    return Exact(best, merged([block.near for block in found]))


def tune(
    searcher: Searcher,
    spec: IndexSpec,
    deleted: np.ndarray,
    queries: Queries,
    answers: Sequence[np.ndarray],
    target: float | None,
) -> Recall:
    """The first settings that reach `target`, or the best there are; then how cautious filters have to be.

    Without a target it is said what those of `spec` reach.

    The number of probed lists is doubled until the target is met; when that no longer helps, twice as many candidates
    are rescored and it starts over.
    """
    probe = _Probe(searcher, deleted, queries, answers)
    found = _tune_unfiltered(probe, spec, target)
    if target is None or spec.kind != "ivf" or not queries.filters:
        return found
    return _tune_filtered(probe, found)


def _tune_unfiltered(probe: "_Probe", spec: IndexSpec, target: float | None) -> Recall:
    count = len(probe.queries.own)
    if probe.k < 1:
        return Recall(1.0, 0, spec)
    if target is None or spec.kind == "flat":
        return Recall(probe.measure(spec).recall, count, spec)
    everywhere = spec.model_copy(update={"kind": "flat"})
    per_s = probe.measure(everywhere, EXHAUSTIVE_QUERIES).per_s
    best, tried = Recall(0.0, count, spec), []
    for trial, found in _trials(probe, spec):
        tried.append(trial.model_dump(include={"nprobe", "refine", "effort"}) | found._asdict())
        if found.recall > best.value:
            best = Recall(found.recall, count, trial, tried=tried, exhaustive_per_s=per_s)
        if found.recall >= target:
            break
    return best


def _trials(probe: "_Probe", spec: IndexSpec) -> "Iterator[tuple[IndexSpec, _Measured]]":
    if spec.kind == "hnsw":
        for refine in [step for step in REFINE_STEPS if step >= spec.refine]:
            before = 0.0
            for effort in (16, 32, 64, 128, 256, 512, 1024):
                trial = spec.model_copy(update={"effort": effort, "refine": refine})
                yield trial, (found := probe.measure(trial))
                if effort >= 64 and found.recall - before < PLATEAU:
                    break
                before = found.recall
        return
    for refine in [step for step in REFINE_STEPS if step >= spec.refine]:
        nprobe, before = 1, 0.0
        while nprobe <= spec.nlist:
            trial = spec.model_copy(update={"nprobe": nprobe, "refine": refine})
            yield trial, (found := probe.measure(trial))
            if nprobe >= 16 and found.recall - before < PLATEAU:
                break
            nprobe, before = nprobe * 2, found.recall


def _tune_filtered(probe: "_Probe", found: Recall) -> Recall:
    rows: list[dict[str, Any]] = []
    for caution in CAUTIONS:
        spec = found.spec.model_copy(update={"caution": caution})
        rows = [row for number in range(len(probe.queries.filters)) for row in probe.filtered(number, spec)]
        if all(row["mean"] >= FILTERED_MEAN and row["p5"] >= FILTERED_LOW for row in rows):
            break
    return replace(found, spec=spec, filtered=rows)


class _Measured(NamedTuple):
    """The share of the exact neighbours that is found, and how many queries are answered in a second."""

    recall: float
    per_s: float


class _Probe:
    """Queries with their exact answers, put to a searcher."""

    def __init__(
        self, searcher: Searcher, deleted: np.ndarray, queries: Queries, answers: Sequence[np.ndarray]
    ) -> None:
        self.searcher, self.queries, self.answers = searcher, queries, answers
        self.live = np.ones(searcher.num_rows, bool)
        self.live[deleted] = False
        self.chosen = searcher.choose(self.live, filtered=False) if len(deleted) else None
        self.k = min(K, int(np.count_nonzero(self.live)) - 1)

    def measure(self, spec: IndexSpec, count: int | None = None) -> _Measured:
        """The first `count` queries, or all, without a filter, asked all at once."""
        started, queries = time.perf_counter(), self.queries
        right = self._right(queries.vectors[:count], queries.own[:count], self.answers[0][:count], self.chosen, spec)
        return _Measured(float(right.mean()), float(f"{len(right) / (time.perf_counter() - started):.4g}"))

    def filtered(self, number: int, spec: IndexSpec) -> list[dict[str, Any]]:
        """Of one filter, for queries inside and outside of it: recall mean, 5th percentile, median milliseconds."""
        filter, count = self.queries.filters[number], self.queries.filtered
        mask = np.concatenate(
            [
                filter.mask(
                    np.load(part.directory / IDS_FILE, mmap_mode="r"),
                    part.assigned if filter.lists is not None else None,
                )
                for part in self.searcher.segments
            ]
        )
        chosen = self.searcher.choose(mask & self.live)
        inside = mask[self.queries.own[:count]]
        found = []
        for where, mine in (("inside", np.flatnonzero(inside)), ("outside", np.flatnonzero(~inside))):
            if len(mine) == 0:
                continue
            right, times = [], []
            for query in mine:
                one = slice(query, query + 1)
                started = time.perf_counter()
                right.append(
                    self._right(
                        self.queries.vectors[one], self.queries.own[one], self.answers[number + 1][one], chosen, spec
                    )[0]
                )
                times.append(time.perf_counter() - started)
            found.append(
                {
                    "share": filter.share, "kind": filter.kind, "queries": where, "count": len(mine),
                    "mean": float(np.mean(right)), "p5": float(np.percentile(right, 5)),
                    "p50_ms": round(float(np.median(times)) * 1e3, 3),
                }
            )  # fmt: skip
        return found

    def _right(
        self,
        vectors: np.ndarray,
        own: np.ndarray,
        answers: np.ndarray,
        chosen: list[Chosen] | None,
        spec: IndexSpec,
    ) -> np.ndarray:
        """The share of each query's exact neighbours that is found, float[Q]."""
        available = np.count_nonzero(np.isfinite(answers), axis=1)
        last = np.take_along_axis(answers, np.maximum(available - 1, 0)[:, None], axis=1)
        scores, rows = self.searcher.search(vectors, K + 1, chosen, spec)
        right = (rows >= 0) & (rows != own[:, None]) & (scores >= last - TIE)
        return np.minimum(right.sum(axis=1), available) / np.maximum(available, 1)
