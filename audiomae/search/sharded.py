"""One release searched in pieces: its vectors lie with several shards, which may be processes on other nodes.

What is looked at is decided once, by the searcher of whoever asks, which has the quantiser, the items and the filters
(`audiomae.search.searcher`). `Shards` is its scanner: every shard scans, walks or compares its own part and scores its
candidates exactly, and what is best of all of them is kept by the rule by which one scanner would have kept it. So the
hits are those of an undivided release, whichever way it is divided. (Where a filter leaves so many rows that lists are
sifted, each shard compares what looks best in its own part, so that a divided release may find a hit more.)

Segments go to shards whole where there are enough of them; larger ones are divided, by inverted lists for scanning and
by rows for exact comparisons. A shard maps the files of the segments it has a part of, and reads its part of them.

How a shard is reached is up to whoever gives the `Ask`; one that cannot be is left out and named in `missing`.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audiomae.artifacts import releases
from audiomae.artifacts.releases import Release
from audiomae.search.index import INDEX_FILE, LISTS_FILE, VECTORS_FILE, Ranked, Selection, shares_of_lists
from audiomae.search.indexed import segment_folders, segment_rows
from audiomae.search.scanning import Candidates, Outline, Piece, Probe, Scanner, Sieve, StoredSegment, best, top
from audiomae.search.searcher import open_quantiser
from audiomae.search.spec import IndexSpec

BULKY = (VECTORS_FILE, LISTS_FILE, INDEX_FILE)  # what shards have, and whoever asks them need not


class ShardMissingError(Exception):
    """A shard that does not answer; its name is the message."""


@dataclass(frozen=True)
class SegmentPart:
    """Share `part` = (number, of how many) of a segment."""

    segment: int
    part: tuple[int, int]


@dataclass(frozen=True)
class Question:
    """What a shard is asked: an operation of `Scans` with its numbers and arrays, and which rows may be found."""

    operation: str
    numbers: Mapping[str, int] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    allowed: Mapping[int, Selection] | None = None


Ask = Callable[[Question], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Divided:
    """How to ask the shards of a release: `asks` by their names, in their order, from threads of `pool`."""

    asks: Mapping[str, Ask]
    pool: ThreadPoolExecutor


def divide(rows: Sequence[int], shards: int, divisible: bool) -> list[list[SegmentPart]]:
    """What each shard has of segments with so many rows: about as many rows each, whole segments where they allow it.

    Args:
        rows: of every segment.
        shards: how many.
        divisible: whether a segment can be divided (a graph cannot; a shard may then have nothing).
    """
    fair = max(1, math.ceil(sum(rows) / shards))
    parts = []
    for number, count in enumerate(rows):
        of = max(1, math.ceil(count / fair)) if divisible else 1
        parts += [(count / of, SegmentPart(number, (place, of))) for place in range(of)]
    found: list[list[SegmentPart]] = [[] for _ in range(shards)]
    loads = [0.0] * shards
    for size, part in sorted(parts, key=lambda pair: -pair[0]):  # the largest first, to who has least
        least = loads.index(min(loads))
        loads[least] += size
        found[least].append(part)
    return [sorted(mine, key=lambda part: (part.segment, part.part)) for mine in found]


def divide_release(release: Release, shards: int) -> list[list[SegmentPart]]:
    """`divide` for the segments of a release."""
    kind = release.info["spec"]["kind"]
    return divide(
        segment_rows(release), shards, kind == "flat" or (kind == "ivf" and release.info.get("quantiser") is not None)
    )


def needed_to_ask(name: str) -> bool:
    """Whether who asks shards needs a file of a release."""
    return name.rpartition("/")[2] not in BULKY


def open_shard(release: Release, number: int, shards: int) -> Scanner:
    """Shard `number` of so many of a release, after checking its files (and fetching them, from S3)."""
    mine = divide_release(release, shards)[number]
    names = [segment["name"] for segment in release.info.get("segments", [{"name": release.path.name}])]
    wanted = {names[part.segment] for part in mine}
    quantiser_name = release.info.get("quantiser")

    def needed(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if quantiser_name is not None and folder == quantiser_name:
            return True
        in_mine = folder in wanted or (not folder and release.path.name in wanted)
        return in_mine and (file in BULKY or file.endswith(".npy"))

    local = releases.fetch(release, needed)
    found = segment_folders(local)
    spec = IndexSpec(**release.info["spec"])
    trained = Path(str(local.path)).parent / quantiser_name if quantiser_name else None
    quantiser = open_quantiser([folder for _, folder, _ in found], trained, spec) if mine else None
    starts = np.cumsum([0, *(rows for _, _, rows in found)])
    pieces = [
        Piece(
            part.segment,
            int(starts[part.segment]),
            StoredSegment(found[part.segment][1], quantiser, spec.kind, part.part),
        )
        for part in mine
    ]
    return Scanner(pieces, int(release.info["dim"]))


def answer(scanner: Scanner, question: Question) -> list[np.ndarray]:
    """What a shard gives back for a question.

    Raises:
        ValueError: no such operation.
    """
    numbers, arrays, allowed = question.numbers, question.arrays, question.allowed
    if question.operation == "scan":
        probe = Probe(arrays["lists"], arrays["similar"])
        return [*scanner.scan(arrays["queries"], numbers["count"], probe, allowed)]
    if question.operation == "sift":
        probe, sieve = (
            Probe(arrays["lists"], arrays["similar"]),
            Sieve(arrays["last"], arrays["margin"], numbers["most"]),
        )
        return [*scanner.sift(arrays["queries"], numbers["k"], probe, sieve, allowed)]
    if question.operation == "walk":
        return [*scanner.walk(arrays["queries"], numbers["count"], numbers["effort"], allowed)]
    if question.operation == "compare":
        return [*scanner.compare(arrays["queries"], numbers["k"], allowed)]
    if question.operation == "vectors":
        return [scanner.vectors(arrays["rows"])]
    raise ValueError(f"operation {question.operation!r}: expected scan, sift, walk, compare or vectors")


class Shards:
    """All shards of a release as one scanner (`audiomae.search.scanning.Scans`).

    Args:
        asks: how to ask each, by its name.
        parts: what each has, from `divide`.
        starts: the first row of every segment, and the number of all rows.
        pool: threads to ask from; several releases may share one.
        sizes: rows of every list in each segment, for inverted lists: who has nothing in a list is not asked about it.

    Attributes:
        missing: names of the shards that did not answer.
    """

    def __init__(
        self,
        asks: Mapping[str, Ask],
        parts: Sequence[Sequence[SegmentPart]],
        starts: np.ndarray,
        pool: ThreadPoolExecutor,
        sizes: Sequence[np.ndarray] = (),
    ) -> None:
        self._asks, self._starts, self._pool = dict(asks), starts, pool
        self._parts = dict(zip(asks, parts, strict=True))
        self._has = np.stack([_lists_of(mine, sizes) for mine in self._parts.values()]) if len(sizes) else None
        self.missing: set[str] = set()

    @classmethod
    def of(cls, release: Release, divided: Divided) -> "Shards":
        """Those of a release on a local disk."""
        found = segment_folders(release)
        starts = np.cumsum([0, *(rows for _, _, rows in found)])
        in_lists = release.info.get("quantiser") is not None
        sizes = [Outline(folder, rows).sizes for _, folder, rows in found] if in_lists else []
        return cls(divided.asks, divide_release(release, len(divided.asks)), starts, divided.pool, sizes)

    def afresh(self) -> "Shards":
        """The same shards for one search, with nothing missing yet."""
        other = copy.copy(self)
        other.missing = set()
        return other

    def scan(self, queries: np.ndarray, count: int, probe: Probe, allowed: Any) -> Candidates:
        """As `Scans.scan`."""
        arrays = {"queries": queries, **probe._asdict()}
        return self._candidates(Question("scan", {"count": count}, arrays), allowed, count, probe.lists)

    def sift(self, queries: np.ndarray, k: int, probe: Probe, sieve: Sieve, allowed: Any) -> Ranked:
        """As `Scans.sift`."""
        arrays = {"queries": queries, **probe._asdict(), "last": sieve.last, "margin": sieve.margin}
        found = self._ask_all(Question("sift", {"k": k, "most": sieve.most}, arrays), allowed, probe.lists)
        return best([(scores, rows) for scores, rows in found], k, len(queries))

    def walk(self, queries: np.ndarray, count: int, effort: int, allowed: Any) -> Candidates:
        """As `Scans.walk`."""
        numbers = {"count": count, "effort": effort}
        return self._candidates(Question("walk", numbers, {"queries": queries}), allowed, count)

    def compare(self, queries: np.ndarray, k: int, allowed: Any) -> Ranked:
        """As `Scans.compare`."""
        found = self._ask_all(Question("compare", {"k": k}, {"queries": queries}), allowed)
        return best([(scores, rows) for scores, rows in found], k, len(queries))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """As `Scans.vectors`, from whichever shards have the rows.

        Raises:
            ShardMissingError: none that has a row answers.
        """
        rows = np.maximum(rows, 0)
        segments = np.searchsorted(self._starts, rows, side="right") - 1
        found: np.ndarray | None = None
        left = np.ones(len(rows), bool)
        for name, parts in self._parts.items():
            mine = np.flatnonzero(left & np.isin(segments, [part.segment for part in parts]))
            if not len(mine):
                continue
            try:
                (vectors,) = self._asks[name](Question("vectors", {}, {"rows": rows[mine]}))
            except ShardMissingError:
                self.missing.add(name)
                continue
            found = np.zeros((len(rows), vectors.shape[1]), np.float32) if found is None else found
            found[mine] = vectors
            left[mine] = False
        if left.any() or found is None:
            raise ShardMissingError(", ".join(sorted(self.missing)))
        return found

    def _candidates(self, question: Question, allowed: Any, count: int, lists: np.ndarray | None = None) -> Candidates:
        found = self._ask_all(question, allowed, lists)
        if not found:
            scores, rows = best([], count, len(question.arrays["queries"]))
            return Candidates(scores, rows, scores)
        if len(found) == 1:
            return Candidates(*found[0])
        approximate, rows, scores = (np.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
        return Candidates(*top(approximate, count, rows, approximate, rows, scores))

    def _ask_all(self, question: Question, allowed: Any, lists: np.ndarray | None = None) -> list[Sequence[np.ndarray]]:
        asked: dict[str, Question] = {}
        needed: np.ndarray = np.ones(len(self._parts), bool)
        if lists is not None and self._has is not None:
            needed = np.any(self._has[:, lists.ravel()], axis=1)
        for (name, parts), is_needed in zip(self._parts.items(), needed, strict=True):
            if not parts or not is_needed or name in self.missing:
                continue
            mine = None if allowed is None else {part.segment: allowed[part.segment] for part in parts}
            if mine is None or any(selection.count for selection in mine.values()):
                asked[name] = Question(question.operation, question.numbers, question.arrays, mine)
        names = list(asked)
        waiting = {name: self._pool.submit(self._asks[name], asked[name]) for name in names[:-1]}
        found = {}
        for name in reversed(names):  # the last from this thread, while others ask the rest
            try:
                found[name] = waiting[name].result() if name in waiting else self._asks[name](asked[name])
            except ShardMissingError:
                self.missing.add(name)
        return [found[name] for name in names if name in found]


def _lists_of(parts: Sequence[SegmentPart], sizes: Sequence[np.ndarray]) -> np.ndarray:
    """In which lists these parts have any row: bool[nlist + 1], the last for no list (-1)."""
    has = np.zeros(len(sizes[0]) + 1, bool)
    for part in parts:
        number, of = part.part
        has[:-1] |= (shares_of_lists(sizes[part.segment], of) == number) & (sizes[part.segment] > 0)
    return has
