"""What a build has to do, as data: which rows are read from where, and which segments they become."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audiomae import storage
from audiomae.artifacts.releases import Release
from audiomae.search.spec import IndexSpec


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of an embedding shard."""

    directory: str
    shard: str
    sha256: str
    start: int
    stop: int
    corpus: int


@dataclass(frozen=True)
class Part:
    """The rows of one build task: slices in order, less the rows where `keep` (bool over all of them) is False."""

    slices: tuple[Slice, ...]
    keep: np.ndarray = field(repr=False)

    @property
    def num_rows(self) -> int:
        """How many rows the part will have."""
        return int(np.count_nonzero(self.keep))

    @property
    def key(self) -> str:
        """A name that changes with anything that decides the part's rows."""
        slices = [(s.shard, s.sha256, s.start, s.stop, s.corpus) for s in self.slices]
        return storage.sha256_bytes(storage.encode_json(slices) + np.packbits(self.keep).tobytes())[:16]


@dataclass(frozen=True)
class OldRows:
    """The rows of an indexed segment, less those in `dropped` (int64, ascending)."""

    name: str
    rows: int
    dropped: np.ndarray = field(repr=False)

    @property
    def num_rows(self) -> int:
        """How many rows are taken."""
        return self.rows - len(self.dropped)


@dataclass(frozen=True)
class SegmentPlan:
    """A segment to be written: rows of older segments, then new ones."""

    old: tuple[OldRows, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def num_rows(self) -> int:
        """How many rows the segment will have."""
        return sum(rows.num_rows for rows in self.old) + sum(part.num_rows for part in self.parts)

    @property
    def key(self) -> str:
        """A name that changes with anything that decides the segment's rows."""
        old = [(o.name, storage.sha256_bytes(o.dropped.tobytes())) for o in self.old]
        return storage.sha256_bytes(storage.encode_json([old, [part.key for part in self.parts]]))[:16]


@dataclass(frozen=True)
class BuildPlan:
    """What a build has to do.

    Attributes:
        base: the release in force; None for a first build.
        kept: segments of it that stay, by name.
        made: segments to write; they come after those that stay.
        trains: whether a quantiser is trained for them (and `kept` is empty).
        spec: what the segments are.
        corpora: one entry per embedding set: root, embeddings, windowing, the SHA-256 of its indexed shards.
        deleted: int64, rows of the kept segments (numbered through in their order) that are no longer found.
        blocked: int64, ids deleted by request, which stay deleted when they are embedded again.
        reason: for the log.
        notes: what the user should know, such as ids to delete that are not there.
    """

    base: Release | None
    kept: tuple[str, ...]
    made: tuple[SegmentPlan, ...]
    trains: bool
    spec: IndexSpec
    corpora: list[dict[str, Any]]
    deleted: np.ndarray
    blocked: np.ndarray
    reason: str
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is to be read from embedding sets."""
        return tuple(part for segment in self.made for part in segment.parts)

    @property
    def num_new(self) -> int:
        """Rows that are read from embedding sets."""
        return sum(part.num_rows for part in self.parts)

    @property
    def key(self) -> str:
        """A name for the build: the same for the same work on the same base."""
        made = [segment.key for segment in self.made]
        facts = [self.base.version if self.base else None, self.kept, made, self.spec.factory, self.spec.nlist]
        return storage.sha256_bytes(storage.encode_json(facts) + self.deleted.tobytes() + self.blocked.tobytes())[:16]


@dataclass(frozen=True)
class Request:
    """What is asked of a build beside the embedding sets to index.

    Attributes:
        delete: int64, ids to delete for good.
        undelete: int64, ids that were deleted by request and are to be found again.
        remove: embedding sets (as they were named when they were indexed) whose clips are no longer found.
    """

    delete: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    undelete: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    remove: tuple[str, ...] = ()
