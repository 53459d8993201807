"""What the release in force holds, looked at for a plan: ids and corpora by segment, mapped, and what is deleted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audiomae.artifacts import releases
from audiomae.artifacts.releases import Release
from audiomae.search.items import Items
from audiomae.search.segments import IDS_FILE, SORTED_IDS_FILE, SORTED_ROWS_FILE

DELETED_FILE, BLOCKED_FILE = "deleted.npy", "blocked_ids.npy"
BLOCK_ROWS = 1 << 20
NONE = np.zeros(0, np.int64)


@dataclass
class IndexedSegment:
    """One segment: `deleted` int64, its rows that are not found, ascending; the rest is mapped."""

    name: str
    folder: Path
    num_rows: int
    deleted: np.ndarray

    def rows_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the ids that are here, deleted or not, and their rows, both int64[n]."""
        if (self.folder / SORTED_IDS_FILE).exists():
            known = np.load(self.folder / SORTED_IDS_FILE, mmap_mode="r")
            rows = np.load(self.folder / SORTED_ROWS_FILE, mmap_mode="r")
        else:  # written by an older version
            unsorted = np.load(self.folder / IDS_FILE, mmap_mode="r")
            rows = np.argsort(unsorted, kind="stable")
            known = unsorted[rows]
        if not len(known):
            return NONE, NONE
        places = np.searchsorted(known, ids, side="right") - 1
        found = np.flatnonzero((places >= 0) & (known[np.maximum(places, 0)] == ids))
        return found, rows[places[found]].astype(np.int64)

    def corpus(self) -> np.ndarray:
        """The corpus number of every row."""
        values: np.ndarray | None = Items(self.folder).column("corpus").values
        assert values is not None
        return values

    def delete(self, rows: np.ndarray) -> bool:
        """Leave more rows out; whether any was found before."""
        before = len(self.deleted)
        self.deleted = np.union1d(self.deleted, rows).astype(np.int64)
        return len(self.deleted) > before


@dataclass
class Indexed:
    """All segments of a release, in order; `changed` tells whether anything was deleted or restored."""

    info: Mapping[str, Any]
    segments: list[IndexedSegment]
    blocked: np.ndarray
    legacy: bool = False
    changed: bool = False
    _restored: list[tuple[IndexedSegment, np.ndarray]] = field(default_factory=list)

    @classmethod
    def open(cls, base: Release | None) -> "Indexed":
        """The files of `base` that a plan looks at are fetched and checked, no others."""
        if base is None:
            return cls({}, [], NONE)
        legacy = "segments" not in base.info
        base = releases.fetch(base, needed_for_plan)
        folder = Path(str(base.path))
        deleted = np.sort(np.load(folder / DELETED_FILE))
        blocked = np.load(folder / BLOCKED_FILE) if (folder / BLOCKED_FILE).exists() else NONE
        segments = []
        start = 0
        for name, path, rows in segment_folders(base):
            mine = deleted[np.searchsorted(deleted, start) : np.searchsorted(deleted, start + rows)] - start
            segments.append(IndexedSegment(name, path, rows, mine))
            start += rows
        return cls(base.info, segments, blocked, legacy)

    @property
    def num_live(self) -> int:
        """Rows that are found."""
        return sum(segment.num_rows - len(segment.deleted) for segment in self.segments)

    def has(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are found, bool[N]."""
        found = np.zeros(len(ids), bool)
        for segment in self.segments:
            places, rows = segment.rows_of(ids)
            found[places[~np.isin(rows, segment.deleted)]] = True
        return found

    def delete_ids(self, ids: np.ndarray) -> None:
        """Rows with these ids are no longer found."""
        for segment in self.segments:
            for start in range(0, len(ids), BLOCK_ROWS):
                rows = segment.rows_of(ids[start : start + BLOCK_ROWS])[1]
                self.changed |= bool(len(rows)) and segment.delete(rows)

    def delete_corpus(self, number: int, but: np.ndarray | None) -> None:
        """Rows of a corpus are no longer found, but those with ids in `but` (ascending)."""
        for segment in self.segments:
            mine = np.flatnonzero(segment.corpus() == number)
            if but is not None and len(mine):
                ids = np.load(segment.folder / IDS_FILE, mmap_mode="r")[mine]
                places = np.minimum(np.searchsorted(but, ids), max(len(but) - 1, 0))
                mine = mine[but[places] != ids] if len(but) else mine
            self.changed |= bool(len(mine)) and segment.delete(mine)

    def restore(self, ids: np.ndarray) -> np.ndarray:
        """Rows with these ids are found again, the latest of each; returns the ids that no segment has any more."""
        missing = np.ones(len(ids), bool)
        for segment in reversed(self.segments):
            places, rows = segment.rows_of(ids)
            here = missing[places]
            missing[places] = False
            if here.any():
                segment.deleted = np.setdiff1d(segment.deleted, rows[here])
                self.changed = True
        return ids[missing]

    def corpora_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the ids that are found, and the numbers of their corpora."""
        found, numbers = [NONE], [NONE]
        for segment in self.segments:
            places, rows = segment.rows_of(ids)
            live = ~np.isin(rows, segment.deleted)
            if live.any():
                found.append(places[live])
                numbers.append(segment.corpus()[rows[live]].astype(np.int64))
        return np.concatenate(found), np.concatenate(numbers)

    def deleted_rows(self, kept: Sequence[str]) -> np.ndarray:
        """Deleted rows of the kept segments, numbered through in their order, int64."""
        by_name = {segment.name: segment for segment in self.segments}
        start, found = 0, [NONE]
        for name in kept:
            found.append(by_name[name].deleted + start)
            start += by_name[name].num_rows
        return np.concatenate(found)


def segment_folders(release: Release) -> list[tuple[str, Path, int]]:
    """(name, folder, rows) of every segment of a release on a local disk; a release of an older version is one."""
    folder = Path(str(release.path))
    if "segments" not in release.info:
        return [("", folder, len(np.load(folder / IDS_FILE, mmap_mode="r")))]
    return [(s["name"], folder.parent / s["name"], int(s["rows"])) for s in release.info["segments"]]


def segment_rows(release: Release) -> list[int]:
    """How many rows every segment of a release has, without a look at its files."""
    return [int(segment["rows"]) for segment in release.info.get("segments", [release.info])]


def needed_for_plan(name: str) -> bool:
    """Whether a plan looks at a file of a release."""
    kinds = (IDS_FILE, SORTED_IDS_FILE, SORTED_ROWS_FILE, DELETED_FILE, BLOCKED_FILE, "items.arrow")
    return name.endswith(kinds) or "/column-" in name
