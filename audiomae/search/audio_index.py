"""A published index, opened for searching: vectors or an id in, clips with their items out."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae import storage
from audiomae.artifacts import releases
from audiomae.errors import FilterError, IntegrityError
from audiomae.search.hits import Hits, Members, best_per_group
from audiomae.search.index import VECTORS_FILE
from audiomae.search.indexed import DELETED_FILE, NONE, IndexedSegment, segment_folders
from audiomae.search.items import ItemsTable
from audiomae.search.layout import MAP_FILE
from audiomae.search.scanning import Outline
from audiomae.search.searcher import Chosen, Searcher, open_quantiser
from audiomae.search.segments import IDS_FILE
from audiomae.search.sharded import Divided, ShardMissingError, Shards, needed_to_ask
from audiomae.search.spec import IndexSpec
from audiomae.storage import Location, read_json


class AudioIndex:
    """A published index, opened for searching. Safe to call from several threads.

    index = AudioIndex.open("INDEX")
    hits = index.search(encoder.embed(["rain.wav"]), k=10, filter={"label": "rain"}, group_by="uri")
    """

    def __init__(self, release: releases.Release, divided: Divided | None = None) -> None:
        self.release = self._published = release
        self.is_divided = divided is not None
        self._directory = Path(str(release.path))
        info = release.info
        self.spec = IndexSpec(**info["spec"])
        found = segment_folders(release)
        folders = [folder for _, folder, _ in found]
        quantiser = info.get("quantiser")
        trained = self._directory.parent / quantiser if quantiser else None
        if divided is None:
            self._searcher = Searcher.open(folders, trained, self.spec)
        else:
            outlines = [Outline(folder, rows) for _, folder, rows in found]
            shards = Shards.of(release, divided)
            opened = open_quantiser(folders, trained, self.spec)
            self._searcher = Searcher(outlines, shards, self.spec, opened, int(info["dim"]))
        self._segments = [IndexedSegment(name, folder, rows, NONE) for name, folder, rows in found]
        self._ids = [np.asarray(np.load(folder / IDS_FILE, mmap_mode="r")) for folder in folders]
        self.table = ItemsTable(folders)
        self._deleted: np.ndarray = np.load(self._directory / DELETED_FILE)
        self._live = self._searcher.choose(self._live_mask(), filtered=False) if len(self._deleted) else None
        self._select = functools.lru_cache(maxsize=32)(self._selection)
        self._groups = functools.lru_cache(maxsize=4)(self._grouping)

    @classmethod
    def open(
        cls,
        index_dir: Location,
        version: str = "latest",
        fingerprint: str | None = None,
        divided: Divided | None = None,
    ) -> "AudioIndex":
        """Open a release after checking every file of it against its checksum.

        Args:
            index_dir: INDEX, local or s3:// (fetched to a local cache), or one release directory.
            version: a version name, or "latest".
            fingerprint: that of the encoder that will make the queries; checked when given.
            divided: how to ask the shards that have the vectors (`audiomae.search.sharded`); by default they are here.

        Raises:
            UserError: no such release. IntegrityError: a damaged file, or an encoder that does not belong to it.
        """
        release = releases.resolve(index_dir, version)
        index = cls(releases.fetch(release, None if divided is None else needed_to_ask), divided)
        index._published = release
        index.check_fingerprint(read_json(index.encoder_dir / "config.json")["fingerprint"])
        if fingerprint is not None:
            index.check_fingerprint(fingerprint)
        return index

    @property
    def version(self) -> str:
        """The version's name, such as `v000003`."""
        return self.release.version

    @property
    def fingerprint(self) -> str:
        """Of the encoder whose vectors are indexed."""
        return self.release.fingerprint

    @property
    def encoder_dir(self) -> Path:
        """The encoder that belongs to this index: `AudioEncoder.load(index.encoder_dir)`."""
        return self._directory / "encoder"

    @property
    def dim(self) -> int:
        """The length of a vector."""
        return self._searcher.dim

    @property
    def columns(self) -> list[str]:
        """The columns of the items table, which a filter may name."""
        return self.table.columns

    def __len__(self) -> int:
        """How many vectors can be found."""
        return self._searcher.num_rows - len(self._deleted)

    def check_fingerprint(self, fingerprint: str) -> None:
        """Refuse queries of another encoder: their vectors have nothing to do with these."""
        if fingerprint != self.fingerprint:
            raise IntegrityError(
                f"encoder and index {self.version} do not belong together: encoder fingerprint {fingerprint}, "
                f"expected {self.fingerprint}; use the encoder in {self.encoder_dir}, or embed and index the corpus "
                "with the new one"
            )

    def search(
        self,
        vectors: np.ndarray,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        group_by: str | None = None,
    ) -> Hits:
        """The k nearest windows of each vector, or the k nearest files by their best window.

        Args:
            vectors: float[Q, D] or float[D], from the encoder of this index; any length but zero.
            k: how many.
            filter: conditions on the columns of the items table, as `audiomae.search.filters` describes.
            group_by: a column ("uri" for files): at most one hit for each of its values, the best, and how many rows
                of that value matched in `Hits.windows`. More rows are looked at until k values are found or all rows
                have been.

        Raises:
            ValueError: vectors of another dimension, not finite or zero, or k < 1.
            FilterError: a filter that does not fit the items table, or a column to group by that it does not have.
        """
        queries, k = self._check_queries(vectors, k), int(k)
        chosen, searcher = self._chosen(filter), self._searcher.afresh()
        if group_by is None:
            return self._hits(searcher, *searcher.search(queries, k, chosen))
        return self._grouped(searcher, queries, k, chosen, self._groups(group_by))

    def search_id(
        self, id: int, k: int = 10, filter: Mapping[str, Any] | None = None, group_by: str | None = None
    ) -> Hits:
        """The k nearest windows of an indexed window, itself left out (Q = 1).

        With `group_by`, as in `search`, its whole group (the file it is from) is left out.

        Raises:
            KeyError: no clip has this id. FilterError: as in `search`.
        """
        row = self._row(id)
        queries, k = self._check_queries(self.vector(id), k), int(k)
        chosen, searcher = self._chosen(filter), self._searcher.afresh()
        if group_by is not None:
            groups = self._groups(group_by)
            return self._grouped(searcher, queries, k, chosen, groups, int(groups[row]))
        scores, rows = searcher.search(queries, k + 1, chosen)
        others = np.argsort(rows[0] == row, kind="stable")[:k]
        return self._hits(searcher, scores[:, others], rows[:, others])

    def search_exactly(self, vectors: np.ndarray, k: int = 10) -> Hits:
        """As `search` without filter or groups, but looking everywhere: what an approximate search is measured with."""
        everywhere = self.spec.model_copy(update={"kind": "flat"})
        queries, searcher = self._check_queries(vectors, k), self._searcher.afresh()
        return self._hits(searcher, *searcher.search(queries, k, self._chosen(None), everywhere))

    def item(self, id: int) -> dict[str, Any]:
        """The items-table row of a clip. Raises KeyError when no clip has this id."""
        return self.table.rows([self._row(id)])[0]

    def vector(self, id: int) -> np.ndarray:
        """The stored vector of a clip, float32[D]. Raises KeyError when no clip has this id."""
        vector: np.ndarray = self.vectors([id])[0]
        return vector

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        """The stored vectors of some clips, float32[N, D]; from the release's files when their shard does not answer.

        Raises:
            KeyError: no clip has one of the ids.
        """
        rows = np.array([self._row(id) for id in ids], np.int64)
        try:
            return self._searcher.scanner.vectors(rows)
        except ShardMissingError:
            return np.stack([self._read_vector(row) for row in rows.tolist()])

    def map(self) -> pa.Table | None:
        """Where the sounds lie on the map (id int64, x and y uint16 of 65,535): one of each file, at most 100,000.

        `None` for a release that was made without a map.
        """
        path = self._directory / MAP_FILE
        return pq.read_table(path) if path.exists() else None

    def live_rows(self) -> np.ndarray | None:
        """Which rows of the items table can be found, bool[N]; None when none is deleted."""
        return self._live_mask() if len(self._deleted) else None

    def corpus_root(self, item: Mapping[str, Any]) -> str:
        """The folder or bucket prefix that the item's `uri` is relative to."""
        return str(self.release.info["corpora"][item["corpus"]]["root"])

    def _row(self, id: int) -> int:
        """The row that is found under an id; of several (one that replaced another) the last."""
        if 0 <= id < 2**63:
            starts = self._searcher.starts
            for number in reversed(range(len(self._segments))):
                for row in self._segments[number].rows_of(np.array([id]))[1] + starts[number]:
                    place = np.searchsorted(self._deleted, row)
                    if place == len(self._deleted) or self._deleted[place] != row:
                        return int(row)
        raise KeyError(f"no clip with id {id} in index {self.version}")

    def _read_vector(self, row: int) -> np.ndarray:
        number = int(np.searchsorted(self._searcher.starts, row, side="right")) - 1
        place = (row - int(self._searcher.starts[number])) * self.dim * 2
        total = self._searcher.segments[number].num_rows * self.dim * 2
        name = self._segments[number].name
        folder = self._published.path.parent / name if name else self._published.path
        with storage.open_seekable(folder / VECTORS_FILE) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size - total + place)  # the file ends with the vectors
            return np.frombuffer(file.read(self.dim * 2), np.float16).astype(np.float32)

    def _live_mask(self) -> np.ndarray:
        live = np.ones(self._searcher.num_rows, dtype=bool)
        live[self._deleted] = False
        return live

    def _chosen(self, where: Mapping[str, Any] | None) -> list[Chosen] | None:
        if where is None or where == {}:
            return self._live
        try:
            text = json.dumps(where, sort_keys=True, default=lambda value: value.item())
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise FilterError(f"a filter holds only text, numbers, booleans and null, got {where!r:.200}") from None
        return self._select(text)

    def _selection(self, where: str) -> list[Chosen]:
        mask = self.table.mask(json.loads(where))
        mask[self._deleted] = False
        return self._searcher.choose(mask)

    def _grouping(self, column: str) -> np.ndarray:
        groups = self.table.groups(column)
        if column != "uri":
            return groups
        roots = [entry["root"] for entry in self.release.info["corpora"]]
        codes = np.unique(np.asarray(roots, dtype=str), return_inverse=True)[1]
        if codes.max(initial=0) == 0:
            return groups
        corpora = np.concatenate([part.column("corpus").values for part in self.table.parts])
        return groups.astype(np.int64) * (codes.max() + 1) + codes[corpora]  # equal uris of two corpora are two files

    def _grouped(
        self,
        searcher: Searcher,
        queries: np.ndarray,
        k: int,
        chosen: list[Chosen] | None,
        groups: np.ndarray,
        without: int | None = None,
    ) -> Hits:
        def find(queries: np.ndarray, count: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            rest = chosen
            if excluded is not None:
                allowed = ~excluded
                for part, start in zip(chosen or [], searcher.starts, strict=False):
                    stop = start + part.segment.num_rows
                    allowed[start:stop] &= part.selection.mask(part.segment.num_rows)
                rest = searcher.choose(allowed)
            return searcher.search(queries, count, rest)

        scores, rows, members = best_per_group(find, queries, k, groups, without)
        return self._hits(searcher, scores, rows, members)

    def _check_queries(self, vectors: np.ndarray, k: int) -> np.ndarray:
        queries = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"query vectors of shape {np.shape(vectors)}, expected [Q, {self.dim}]: use the encoder of this index"
            )
        if k < 1:
            raise ValueError(f"k={k}, expected at least 1")
        norms = np.sqrt(np.vecdot(queries, queries))
        if len(norms) and not (norms.min() > 1e-12 and norms.max() < np.inf):  # neither is true of NaN
            raise ValueError("a query vector is zero or has NaN or infinity in it; expected a finite direction")
        return np.ascontiguousarray(queries / norms[:, None])

    def _hits(
        self, searcher: Searcher, scores: np.ndarray, rows: np.ndarray, members: list[list[Members]] | None = None
    ) -> Hits:
        if len(self._ids) == 1:
            ids = self._ids[0][rows]
        else:
            ids = np.empty(rows.shape, np.int64)
            numbers = np.searchsorted(self._searcher.starts, rows, side="right") - 1
            for number, known in enumerate(self._ids):
                mine = numbers == number
                ids[mine] = known[rows[mine] - self._searcher.starts[number]]
        ids[rows < 0] = -1
        return Hits(ids, scores, rows, self.table, members, searcher.missing)
