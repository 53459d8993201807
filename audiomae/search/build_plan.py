"""What a build has to do: compare the embedding sets with the release in force, row by row, by id and checksum.

The plan names slices of stored tables (embedding shards, or an older release that has to be rebuilt) and which of
their rows to keep, cut into parts of about equal size that can be read and indexed at the same time.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from audiomae import storage
from audiomae.artifacts.embeddings import EmbeddingSet, ShardReceipt
from audiomae.artifacts.releases import Release, fetch
from audiomae.artifacts.tables import map_ahead
from audiomae.errors import UserError
from audiomae.search import index as ann
from audiomae.search.items import Items
from audiomae.search.spec import BuildOptions, IndexSpec, choose
from audiomae.storage import open_seekable


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of one stored table: an embedding shard, or (with no shard name) a release."""

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
class Plan:
    """What a build has to do.

    Attributes:
        base: the release to extend; None to build everything (`parts` then include the rows of an older release).
        parts: what to read and index.
        spec: the index to train, or that of `base`.
        corpora: one entry per embedding set: root, embeddings, windowing, the SHA-256 of its indexed shards.
        deleted: int64, rows of `base` that are no longer found.
        blocked: int64, ids deleted by request, which stay deleted when they are embedded again.
        reason: for the log.
    """

    base: Release | None
    parts: tuple[Part, ...]
    spec: IndexSpec
    corpora: list[dict[str, Any]]
    deleted: np.ndarray
    blocked: np.ndarray
    reason: str

    @property
    def num_new(self) -> int:
        """Rows that the parts bring."""
        return sum(part.num_rows for part in self.parts)


@dataclass
class _Rows:
    """The rows that are not indexed yet, in build order, while the plan is made."""

    slices: list[Slice] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)

    def ids_array(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self.ids])

    def corpus_array(self) -> np.ndarray:
        return np.repeat([s.corpus for s in self.slices], [s.stop - s.start for s in self.slices]).astype(np.int64)


@dataclass(frozen=True)
class _Indexed:
    """What the release in force holds, row by row: ids, corpus numbers, which are found; and the blocked ids."""

    ids: np.ndarray
    corpus: np.ndarray
    live: np.ndarray
    blocked: np.ndarray

    @classmethod
    def read(cls, base: Release | None) -> "_Indexed":
        if base is None:
            none = np.zeros(0, np.int64)
            return cls(none, none, np.zeros(0, bool), none)
        folder = Path(str(fetch(base).path))
        ids = np.load(folder / ann.IDS_FILE)
        live = np.ones(len(ids), dtype=bool)
        live[np.load(folder / ann.DELETED_FILE)] = False
        return cls(ids, Items(folder).table.column("corpus").to_numpy(), live, np.load(folder / ann.BLOCKED_FILE))


def make_plan(
    sets: Sequence[EmbeddingSet], base: Release | None, delete_ids: np.ndarray, config: BuildOptions
) -> Plan | None:
    """Compare what is embedded with what is indexed; None when the release in force has it all.

    Shards are recognised by their SHA-256, so a set that moved is not indexed again. A row whose id is indexed already
    (a clip embedded again) replaces the old one. Clips that an indexed set no longer has are deleted.

    Args:
        sets: the embedding sets to be in the index, beside those that are.
        base: the release in force.
        delete_ids: int64, ids to delete for good.
        config: the build settings.

    Raises:
        UserError: the same id in corpora with different roots, or nothing to index at all.
    """
    if base is None and not sets:
        raise UserError("nothing to index: name at least one --embeddings DIR")
    corpora = [dict(entry) for entry in base.info["corpora"]] if base else []
    old = _Indexed.read(base)
    live = old.live.copy()
    new = _Rows()
    for embeddings in sets:
        _add_set(embeddings, corpora, new, old, live)
    blocked = np.union1d(old.blocked, delete_ids).astype(np.int64)
    new_ids = new.ids_array()
    _check_roots(
        np.concatenate([old.ids[live], new_ids]),
        np.concatenate([old.corpus[live], new.corpus_array()]),
        [entry["root"] for entry in corpora],
    )
    keep = _last_of_each(new_ids) & ~np.isin(new_ids, blocked)
    live &= ~np.isin(old.ids, new_ids[keep]) & ~np.isin(old.ids, blocked)

    total = int(np.count_nonzero(live) + np.count_nonzero(keep))
    if total == 0:
        raise UserError("nothing to index: the embedding sets hold no rows, or all were deleted")
    dim = int(base.info["dim"]) if base else sets[0].dim
    spec = choose(total, dim, config.memory_gib, config.flat_max_rows)
    if base and not (reason := _why_rebuild(IndexSpec(**base.info["spec"]), spec, live, config)):
        unchanged = not keep.any() and np.array_equal(live, old.live) and np.array_equal(blocked, old.blocked)
        if unchanged and corpora == base.info["corpora"] and base.info["recall"]["value"] >= config.recall:
            return None
        parts = _cut(new.slices, keep, config)
        deleted = np.flatnonzero(~live)
        return Plan(base, parts, IndexSpec(**base.info["spec"]), corpora, deleted, blocked, f"extends {base.version}")
    if base:
        new.slices.insert(0, Slice(str(base.path), "", "", 0, len(live), -1))
        keep = np.concatenate([live, keep])
        reason = f"rebuilds {base.version}: {reason}"
    else:
        reason = "first build"
    return Plan(None, _cut(new.slices, keep, config), spec, corpora, np.zeros(0, np.int64), blocked, reason)


def _add_set(
    embeddings: EmbeddingSet, corpora: list[dict[str, Any]], new: _Rows, old: _Indexed, live: np.ndarray
) -> None:
    known = {sha for entry in corpora for sha in entry["shards"]}
    path = str(embeddings.path)
    receipts = list(embeddings.receipts.values())
    fresh = [receipt for receipt in receipts if receipt.sha256 not in known]
    number = next((i for i, entry in enumerate(corpora) if entry["embeddings"] == path), len(corpora))
    if number == len(corpora):
        if receipts and not fresh:
            return  # all of it is indexed: a copy, or a set that moved
        windows = embeddings.settings.model_dump(include={"mode", "window_s", "hop_s"})
        corpora.append({"root": embeddings.corpus_root, "embeddings": path, "shards": [], **windows})
    shards = [receipt.sha256 for receipt in receipts]
    if set(corpora[number]["shards"]) - set(shards):  # the set was updated: what it no longer has is not found any more
        current = np.concatenate([np.zeros(0, np.int64), *_read_ids(embeddings, receipts)])
        live &= (old.corpus != number) | np.isin(old.ids, current)
    corpora[number]["shards"] = shards
    for receipt, ids in zip(fresh, _read_ids(embeddings, fresh), strict=True):
        new.slices.append(Slice(path, receipt.shard, receipt.sha256, 0, len(ids), number))
        new.ids.append(ids)


def _read_ids(embeddings: EmbeddingSet, receipts: Sequence[ShardReceipt]) -> Iterator[np.ndarray]:
    def read(receipt: ShardReceipt) -> np.ndarray:
        path, entry = embeddings.path / receipt.embeddings, receipt.files[receipt.embeddings]
        # a small part of the shard, which is checked whole when its rows are read
        with open_seekable(path, entry.bytes) as file:
            return pq.read_table(file, columns=["id"], page_checksum_verification=True).column("id").to_numpy()

    return map_ahead(read, receipts)


def _check_roots(ids: np.ndarray, corpus: np.ndarray, roots: Sequence[str]) -> None:
    codes = np.unique(np.asarray(roots, dtype=str), return_inverse=True)[1][corpus]
    order = np.argsort(ids, kind="stable")
    clash = (np.diff(ids[order]) == 0) & (np.diff(codes[order]) != 0)
    if clash.any():
        first = int(np.flatnonzero(clash)[0])
        one, other = (roots[corpus[order[first + step]]] for step in (0, 1))
        raise UserError(
            f"{np.count_nonzero(clash)} ids are in two corpora (id {ids[order[first]]} in {one} and in {other}): "
            "ids are made from the path within a corpus, so embed both with their common parent folder as --corpus, "
            "or put them into two indexes"
        )


def _last_of_each(ids: np.ndarray) -> np.ndarray:
    keep = np.zeros(len(ids), dtype=bool)
    keep[len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]] = True
    return keep


def _why_rebuild(old: IndexSpec, new: IndexSpec, live: np.ndarray, config: BuildOptions) -> str:
    dead = 1 - np.count_nonzero(live) / len(live)
    if dead > config.compact_share:
        return f"{dead:.0%} of its rows are deleted"
    old_codec, new_codec = old.factory.partition(",")[2], new.factory.partition(",")[2]
    if (old.kind, old_codec) != (new.kind, new_codec):
        return f"{new.factory or 'an exhaustive scan'} suits this size and memory, not {old.factory or 'a scan'}"
    if new.nlist >= 4 * max(old.nlist, 1):
        return f"{new.nlist} lists suit this size, not {old.nlist}"
    return ""


def _cut(slices: Sequence[Slice], keep: np.ndarray, config: BuildOptions) -> tuple[Part, ...]:
    total = len(keep)
    if not keep.any():
        return ()
    count = max(min(config.min_parts, total), -(-total // config.rows_per_part))
    edges = [round(total * number / count) for number in range(count + 1)]
    starts = np.cumsum([0, *(piece.stop - piece.start for piece in slices)])
    parts = []
    for low, high in itertools.pairwise(edges):
        pieces = []
        for piece, start in zip(slices, starts, strict=False):
            first, last = max(low - start, 0), min(high - start, piece.stop - piece.start)
            if first < last and keep[start + first : start + last].any():
                pieces.append((replace(piece, start=int(first), stop=int(last)), keep[start + first : start + last]))
        if pieces:
            parts.append(Part(tuple(p for p, _ in pieces), np.concatenate([k for _, k in pieces])))
    return tuple(parts)
