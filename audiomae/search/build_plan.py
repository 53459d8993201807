"""What a build has to do: compare the embedding sets with the release in force, row by row, by id and checksum.

The plan says which segments stay as they are, which are written (from slices of embedding shards, cut into parts that
can be read at the same time, and from the rows of older segments), and which rows are no longer found. Making it takes
8 bytes of memory a new row beside what one row in sixteen needs; nothing grows with the rows that are indexed already.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae import storage
from audiomae.artifacts.embeddings import EmbeddingSet, ShardReceipt, read_shard
from audiomae.artifacts.releases import Release
from audiomae.artifacts.tables import map_ahead
from audiomae.errors import UserError
from audiomae.search.arrangement import arrange, cut, rebuilt, why_rebuild
from audiomae.search.indexed import Indexed
from audiomae.search.plan import BuildPlan, Request, Slice
from audiomae.search.spec import BuildOptions, IndexSpec, choose

BUCKETS = 16  # ids are hashes: a sixteenth of them is compared at a time


@dataclass
class _NewRows:
    """The rows that are not indexed yet, in build order, while the plan is made."""

    slices: list[Slice] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)

    def take_ids(self) -> np.ndarray:
        """All ids; the list is emptied, so that they are held once."""
        total = np.empty(sum(map(len, self.ids)), np.int64)
        start = 0
        for number, ids in enumerate(self.ids):
            total[start : start + len(ids)] = ids
            start += len(ids)
            self.ids[number] = ids[:0]
        return total

    def corpus_array(self) -> np.ndarray:
        return np.repeat([s.corpus for s in self.slices], [s.stop - s.start for s in self.slices]).astype(np.int32)


def make_plan(
    sets: Sequence[EmbeddingSet], base: Release | None, request: Request, config: BuildOptions
) -> BuildPlan | None:
    """Compare what is embedded with what is indexed; None when the release in force has it all.

    Shards are recognised by their SHA-256, so a set that moved is not indexed again. A row whose id is indexed already
    (a clip embedded again) replaces the old one. Clips that an indexed set no longer has are deleted.

    Args:
        sets: the embedding sets to be in the index, beside those that are.
        base: the release in force.
        request: ids to delete or to find again, sets to remove.
        config: the build settings.

    Raises:
        UserError: the same id in corpora with different roots, a set to remove that is not indexed, or nothing to
            index at all.
    """
    if base is None and not sets:
        raise UserError("nothing to index: name at least one --embeddings DIR")
    old = Indexed.open(base)
    corpora = [dict(entry) for entry in base.info["corpora"]] if base else []
    notes: list[str] = []
    _remove_sets(request.remove, corpora, old)
    blocked = _new_blocked(old, request, notes)
    new = _NewRows()
    for embeddings in sets:
        _add_set(embeddings, corpora, new, old)
    missing = old.restore(np.setdiff1d(np.intersect1d(request.undelete, old.blocked), blocked))
    keep = _rows_to_add(new, old, corpora, blocked, (sets, missing), notes)
    old.delete_ids(blocked)

    total = old.num_live + int(np.count_nonzero(keep))
    if total == 0:
        raise UserError("nothing to index: the embedding sets hold no rows, or all were deleted")
    dim = int(base.info["dim"]) if base else sets[0].dim
    spec = choose(total, dim, config.memory_gib, config.flat_max_rows, config.index)
    rebuild = why_rebuild(old, spec, config) if base else "first build"
    if base and not rebuild:
        same = not keep.any() and not old.changed and np.array_equal(blocked, old.blocked)
        if same and corpora == base.info["corpora"] and base.info["recall"]["value"] >= config.recall:
            return None
        spec = IndexSpec(**base.info["spec"])
        kept, made = arrange(old.segments, cut(new.slices, keep, config), config)
        reason = f"extends {base.version}"
    else:
        kept, made = (), rebuilt(old.segments, cut(new.slices, keep, config), config)
        reason = f"rebuilds {base.version}: {rebuild}" if base else rebuild
    deleted = old.deleted_rows(kept)
    trains = bool(rebuild) and spec.kind == "ivf"
    return BuildPlan(base, kept, made, trains, spec, corpora, deleted, blocked, reason, tuple(notes))


def _new_blocked(old: Indexed, request: Request, notes: list[str]) -> np.ndarray:
    _note_unknown(
        np.setdiff1d(request.delete, old.blocked), old, "delete", "they stay deleted if embedded later", notes
    )
    never = np.setdiff1d(request.undelete, old.blocked)
    if len(never):
        notes.append(f"{_some(never)} to undelete: never deleted by request, so nothing changes for them")
    return np.setdiff1d(np.union1d(old.blocked, request.delete), request.undelete).astype(np.int64)


def _note_unknown(ids: np.ndarray, old: Indexed, verb: str, what: str, notes: list[str]) -> None:
    unknown = ids[~old.has(ids)]
    if len(unknown):
        notes.append(f"{_some(unknown)} to {verb} not in the index ({what})")


def _some(ids: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in ids[:5])
    return f"{len(ids)} {'id' if len(ids) == 1 else 'ids'} ({shown}{', ...' if len(ids) > 5 else ''})"


def _remove_sets(names: Sequence[str], corpora: list[dict[str, Any]], old: Indexed) -> None:
    for name in names:
        path = str(storage.to_path(name))
        numbers = [number for number, entry in enumerate(corpora) if entry["embeddings"] == path]
        if not numbers:
            known = ", ".join(entry["embeddings"] for entry in corpora) or "none"
            raise UserError(f"--remove {path}: not among the indexed embedding sets ({known})")
        old.delete_corpus(numbers[0], None)
        corpora[numbers[0]] = corpora[numbers[0]] | {"shards": []}


def _add_set(embeddings: EmbeddingSet, corpora: list[dict[str, Any]], new: _NewRows, old: Indexed) -> None:
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
        current = _NewRows(ids=list(_read_ids(embeddings, receipts))).take_ids()
        current.sort()
        old.delete_corpus(number, current)
    corpora[number]["shards"] = shards
    for receipt, ids in zip(fresh, _read_ids(embeddings, fresh), strict=True):
        new.slices.append(Slice(path, receipt.shard, receipt.sha256, 0, len(ids), number))
        new.ids.append(ids)


def _read_ids(embeddings: EmbeddingSet, receipts: Sequence[ShardReceipt]) -> Iterator[np.ndarray]:
    def read(receipt: ShardReceipt) -> np.ndarray:
        path = embeddings.path / receipt.embeddings
        try:
            with storage.open_seekable(
                path
            ) as file:  # a small part of the shard, which is checked whole when its rows are read
                return pq.read_table(file, columns=["id"], page_checksum_verification=True).column("id").to_numpy()
        except (OSError, pa.ArrowException):
            return read_shard(embeddings.path, receipt, ["id"])["id"].to_numpy()  # or what is wrong with which file

    return map_ahead(read, receipts)


def _rows_to_add(
    new: _NewRows,
    old: Indexed,
    corpora: Sequence[dict[str, Any]],
    blocked: np.ndarray,
    restoring: tuple[Sequence[EmbeddingSet], np.ndarray],
    notes: list[str],
) -> np.ndarray:
    """Which of the new rows are indexed, bool[N]; rows of the release that they replace are deleted."""
    fresh = len(new.slices)
    if len(restoring[1]):
        _read_again(*restoring, corpora, new, notes)
    wanted = [int(piece.stop - piece.start) for piece in new.slices[:fresh]]
    ids = new.take_ids()
    keep = _last_of_each(ids) & ~is_member(ids, blocked)
    again = sum(wanted)
    keep[again:] &= is_member(ids[again:], restoring[1])
    roots = [entry["root"] for entry in corpora]
    if len(set(roots)) > 1:
        _check_roots(ids, keep, new.corpus_array(), old, roots)
    old.delete_ids(ids[keep])
    return keep


def _read_again(
    sets: Sequence[EmbeddingSet],
    missing: np.ndarray,
    corpora: Sequence[dict[str, Any]],
    new: _NewRows,
    notes: list[str],
) -> None:
    """Rows that a merge had dropped come from their embedding sets again."""
    found, fresh = np.zeros(0, np.int64), {piece.sha256 for piece in new.slices}
    for embeddings in sets:
        number = next((i for i, entry in enumerate(corpora) if entry["embeddings"] == str(embeddings.path)), None)
        receipts = [r for r in embeddings.receipts.values() if number is not None and r.sha256 not in fresh]
        for receipt, ids in zip(receipts, _read_ids(embeddings, receipts), strict=True):
            if is_member(ids, missing).any():
                path = str(embeddings.path)
                new.slices.append(Slice(path, receipt.shard, receipt.sha256, 0, len(ids), int(number or 0)))
                new.ids.append(ids)
                found = np.union1d(found, ids)
    lost = np.setdiff1d(missing, found)
    if len(lost):
        notes.append(f"{_some(lost)} to undelete no longer in the index: name their --embeddings as well")


def is_member(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which ids are among `values` (ascending), bool[N], a block at a time."""
    found = np.zeros(len(ids), bool)
    if len(values):
        for start in range(0, len(ids), 1 << 20):
            block = ids[start : start + (1 << 20)]
            places = np.minimum(np.searchsorted(values, block), len(values) - 1)
            found[start : start + len(block)] = values[places] == block
    return found


def _buckets(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of a sixteenth of the ids after another; equal ids are together."""
    if len(ids) < 1 << 20:
        yield np.arange(len(ids))
        return
    for bucket in range(BUCKETS):
        yield np.flatnonzero(ids % BUCKETS == bucket)


def _last_of_each(ids: np.ndarray) -> np.ndarray:
    keep = np.zeros(len(ids), dtype=bool)
    for rows in _buckets(ids):
        mine = ids[rows]
        keep[rows[len(mine) - 1 - np.unique(mine[::-1], return_index=True)[1]]] = True
    return keep


def _check_roots(ids: np.ndarray, keep: np.ndarray, corpus: np.ndarray, old: Indexed, roots: Sequence[str]) -> None:
    codes = np.unique(np.asarray(roots, dtype=str), return_inverse=True)[1]
    count, first = 0, None
    for rows in _buckets(ids):
        order = rows[np.argsort(ids[rows], kind="stable")]
        mine, theirs = ids[order], codes[corpus[order]]
        clash = np.flatnonzero((np.diff(mine) == 0) & (np.diff(theirs) != 0))
        count += len(clash)
        if len(clash) and first is None:
            place = int(clash[0])
            first = (int(mine[place]), *(roots[corpus[order[place + step]]] for step in (0, 1)))
        places, numbers = old.corpora_of(ids[rows])
        other = np.flatnonzero(codes[numbers] != codes[corpus[rows[places]]])
        count += len(other)
        if len(other) and first is None:
            place = int(other[0])
            first = (int(ids[rows[places[place]]]), roots[numbers[place]], roots[corpus[rows[places[place]]]])
    if first:
        raise UserError(
            f"{count} ids are in two corpora (id {first[0]} in {first[1]} and in {first[2]}): "
            "ids are made from the path within a corpus, so embed both with their common parent folder as --corpus, "
            "or put them into two indexes"
        )
