"""A published index, opened for searching: vectors or an id in, clips with their items out."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.artifacts import releases
from audiomae.errors import FilterError, IntegrityError
from audiomae.search.hits import Hits, Members, best_per_group
from audiomae.search.index import DELETED_FILE, IDS_FILE, Searcher, Selection
from audiomae.search.items import Items
from audiomae.search.layout import MAP_FILE
from audiomae.search.spec import IndexSpec
from audiomae.storage import Location, read_json


class AudioIndex:
    """A published index, opened for searching. Safe to call from several threads.

    index = AudioIndex.open("INDEX")
    hits = index.search(encoder.embed(["rain.wav"]), k=10, filter={"label": "rain"}, group_by="uri")
    """

    def __init__(self, release: releases.Release) -> None:
        self.release = release
        self._directory = Path(str(release.path))
        info = release.info
        self.spec = IndexSpec(**info["spec"])
        self._searcher = Searcher(self._directory, self.spec)
        self._ids: np.ndarray = np.load(self._directory / IDS_FILE, mmap_mode="r")
        self.table = Items(self._directory)
        deleted = np.load(self._directory / DELETED_FILE)
        self._live: np.ndarray | None = None
        if len(deleted):
            self._live = np.ones(self._searcher.num_rows, dtype=bool)
            self._live[deleted] = False
        self._select = functools.lru_cache(maxsize=32)(self._selection)
        self._groups = functools.lru_cache(maxsize=4)(self._grouping)

    @classmethod
    def open(cls, index_dir: Location, version: str = "latest", fingerprint: str | None = None) -> "AudioIndex":
        """Open a release after checking every file of it against its checksum.

        Args:
            index_dir: INDEX, local or s3:// (fetched to a local cache), or one release directory.
            version: a version name, or "latest".
            fingerprint: that of the encoder that will make the queries; checked when given.

        Raises:
            UserError: no such release. IntegrityError: a damaged file, or an encoder that does not belong to it.
        """
        index = cls(releases.fetch(releases.resolve(index_dir, version)))
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
        return len(self._ids) if self._live is None else int(np.count_nonzero(self._live))

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
        selection = self._selection_for(filter)
        if group_by is None:
            return self._hits(*self._searcher.search(queries, k, selection))
        return self._grouped(queries, k, selection, self._groups(group_by))

    def search_id(
        self, id: int, k: int = 10, filter: Mapping[str, Any] | None = None, group_by: str | None = None
    ) -> Hits:
        """The k nearest windows of an indexed window, itself left out (Q = 1).

        With `group_by`, as in `search`, its whole group (the file it is from) is left out.

        Raises:
            KeyError: no clip has this id. FilterError: as in `search`.
        """
        row = self._row(id)
        queries, k = self._check_queries(self._searcher.rows[row], k), int(k)
        selection = self._selection_for(filter)
        if group_by is not None:
            groups = self._groups(group_by)
            return self._grouped(queries, k, selection, groups, int(groups[row]))
        scores, rows = self._searcher.search(queries, k + 1, selection)
        others = np.argsort(rows[0] == row, kind="stable")[:k]
        return self._hits(scores[:, others], rows[:, others])

    def item(self, id: int) -> dict[str, Any]:
        """The items-table row of a clip. Raises KeyError when no clip has this id."""
        return self.table.rows([self._row(id)])[0]

    def vector(self, id: int) -> np.ndarray:
        """The stored vector of a clip, float32[D]. Raises KeyError when no clip has this id."""
        return self._searcher.rows[self._row(id)].astype(np.float32)

    def map(self) -> pa.Table | None:
        """Where the sounds lie on the map (id int64, x and y uint16 of 65,535): one of each file, at most 100,000.

        `None` for a release that was made without a map.
        """
        path = self._directory / MAP_FILE
        return pq.read_table(path) if path.exists() else None

    def live_rows(self) -> np.ndarray | None:
        """Which rows of the items table can be found, bool[N]; None when none is deleted."""
        return self._live

    def corpus_root(self, item: Mapping[str, Any]) -> str:
        """The folder or bucket prefix that the item's `uri` is relative to."""
        return str(self.release.info["corpora"][item["corpus"]]["root"])

    def _row(self, id: int) -> int:
        found = np.flatnonzero(self._ids == id)
        if self._live is not None:
            found = found[self._live[found]]
        if not len(found):
            raise KeyError(f"no clip with id {id} in index {self.version}")
        return int(found[-1])

    def _selection_for(self, where: Mapping[str, Any] | None) -> Selection | None:
        if where is None or where == {}:
            return None if self._live is None else self._select("{}")
        try:
            text = json.dumps(where, sort_keys=True, default=lambda value: value.item())
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise FilterError(f"a filter holds only text, numbers, booleans and null, got {where!r:.200}") from None
        return self._select(text)

    def _selection(self, where: str) -> Selection:
        mask = self.table.mask(json.loads(where))
        return Selection.of(mask if self._live is None else mask & self._live)

    def _grouping(self, column: str) -> np.ndarray:
        groups = self.table.groups(column)
        if column != "uri":
            return groups
        roots = [entry["root"] for entry in self.release.info["corpora"]]
        codes = np.unique(np.asarray(roots, dtype=str), return_inverse=True)[1]
        if codes.max(initial=0) == 0:
            return groups
        corpora = self.table.table.column("corpus").to_numpy()  # equal uris of two corpora are two files
        return groups.astype(np.int64) * (codes.max() + 1) + codes[corpora]

    def _grouped(
        self, queries: np.ndarray, k: int, selection: Selection | None, groups: np.ndarray, without: int | None = None
    ) -> Hits:
        def find(queries: np.ndarray, count: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            chosen = selection
            if excluded is not None:
                chosen = Selection.of(~excluded if selection is None else ~excluded & selection.mask(len(groups)))
            return self._searcher.search(queries, count, chosen)

        scores, rows, members = best_per_group(find, queries, k, groups, without)
        return self._hits(scores, rows, members)

    def _check_queries(self, vectors: np.ndarray, k: int) -> np.ndarray:
        queries = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"query vectors of shape {np.shape(vectors)}, expected [Q, {self.dim}]: use the encoder of this index"
            )
        if k < 1:
            raise ValueError(f"k={k}, expected at least 1")
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 1e-12)).all():
            raise ValueError("a query vector is zero or has NaN or infinity in it; expected a finite direction")
        return np.ascontiguousarray(queries / norms)

    def _hits(self, scores: np.ndarray, rows: np.ndarray, members: list[list[Members]] | None = None) -> Hits:
        ids = self._ids[rows]
        ids[rows < 0] = -1
        return Hits(np.asarray(ids), scores, rows, self.table, members)
