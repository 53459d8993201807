"""An opened release in the process that answers: the index, mapped, and what a listener wants to know of it."""

import datetime
import functools
import json
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.search.audio_index import AudioIndex
from audiomae.search.hits import Hits
from serve.quality import Calibration, calibrate

PLACE = ("id", "uri", "start_s", "end_s")
HIDDEN = ("corpus",)
EXAMPLES, CANDIDATES = 6, 512
MAP_VALUES = 20  # kinds with a colour of their own
CALIBRATED_AT_ONCE = 200_000  # rows
MAX_DISTINCT = 50_000  # a column of more different values than this is a name and not a kind


class Catalogue:
    """A release's items: found, listed, counted. Safe to call from several threads.

    Args:
        index: the opened release.
    """

    def __init__(self, index: AudioIndex) -> None:
        self.index = index
        self.version, self.fingerprint = index.version, index.fingerprint
        self.rows, self.dim = len(index), index.dim
        self.columns = tuple(column for column in index.columns if column not in HIDDEN)
        self.window_s: float | None = index.release.info["corpora"][0].get("window_s")
        self.precision: str | None = index.release.info.get("precision")
        files = index.table.groups("uri")
        self._live = index.table.mask({})
        live = index.live_rows()
        if live is not None:
            self._live = live
        self.sounds, self.hours = _extent(files[self._live], self._column("end_s")[self._live])
        self.one_window_a_file = self.sounds == self.rows
        self.written: dict[int, tuple[bytes, bytes]] = {}  # items as JSON (`serve.answers`)
        self.calibration: Calibration | None = None
        if self.rows <= CALIBRATED_AT_ONCE and not index.is_divided:
            self._calibrate()
        else:  # minutes of searching in a large release, or shards that may not be there yet: no probability until then
            threading.Thread(target=self._calibrate, name="calibrate", daemon=True).start()
        self.facets = functools.lru_cache(maxsize=32)(self._facets)
        self.map = functools.lru_cache(maxsize=4)(self._map)

    def search(self, queries: np.ndarray, k: int, filter: dict[str, Any] | None, by_file: bool) -> Hits:
        """The k best windows, or (`by_file`) files, of unit vectors float32[Q, dim]."""
        group = "uri" if by_file and not self.one_window_a_file else None
        return self.index.search(queries, k=k, filter=filter, group_by=group)

    def item(self, clip: int) -> dict[str, Any] | None:
        """The items-table row of `clip`; `None` when there is no such item."""
        try:
            return self.index.item(clip)
        except KeyError:
            return None

    def items(self, filter: dict[str, Any] | None, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """How many items the filter lets through, and those from `offset` on, in the order of the table."""
        rows = np.flatnonzero(self._mask(filter))
        return len(rows), self.index.table.rows(rows[offset : offset + limit])

    @functools.cached_property
    def examples(self) -> list[dict[str, Any]]:
        """A few items as different as the columns say: one of each kind, else spread over the table."""
        rows = np.flatnonzero(self._live)
        kinds = self._kinds()
        places = spread(np.zeros(len(rows), int) if kinds is None else kinds[rows], EXAMPLES)
        return self.index.table.rows(rows[places[:CANDIDATES]])

    def _map(self, colour: str | None) -> dict[str, Any] | None:
        """The map's points with the codes of a column; `None` when the release has no map. KeyError: no such column."""
        points = self.index.map()
        if points is None:
            return None
        ids = points["id"].to_numpy()
        all_ids = self._column("id", np.int64)
        order = np.argsort(all_ids, kind="stable")
        rows = order[np.searchsorted(all_ids, ids, sorter=order)]
        names, codes = [], np.full(len(ids), -1)
        if colour is not None:
            column = self.index.table.table.column(colour)
            dictionary = pc.dictionary_encode(column.take(pa.array(rows)).combine_chunks())
            found = dictionary.indices.fill_null(-1).to_numpy()
            counts = np.bincount(found[found >= 0], minlength=len(dictionary.dictionary))
            common = np.argsort(-counts, kind="stable")[:MAP_VALUES]
            names = dictionary.dictionary.take(pa.array(common)).to_pylist()
            code_of = np.full(len(counts) + 1, -1)
            code_of[common] = np.arange(len(common))
            codes = code_of[found]
        return {
            "release": self.version,
            "total": self.sounds,
            "shown": len(ids),
            "colour": colour,
            "values": names,
            "id": [str(id) for id in ids.tolist()],
            "x": points["x"].to_numpy(),
            "y": points["y"].to_numpy(),
            "code": codes,
        }

    def _calibrate(self) -> None:
        self.calibration = calibrate(self.index, np.flatnonzero(self._live))

    def _facets(self, filter_json: str | None, limit: int) -> dict[str, Any]:
        """Counts of the columns' values among the items that a filter (JSON text) lets through."""
        mask = self._mask(json.loads(filter_json) if filter_json else None)
        table = self.index.table.table
        found = []
        for name in self.columns:
            if name in PLACE:
                continue
            facet = _facet(name, table.column(name), mask, limit)
            if facet is not None:
                found.append(facet)
        return {"release": self.version, "total": int(np.count_nonzero(mask)), "facets": found}

    def _mask(self, filter: dict[str, Any] | None) -> np.ndarray:
        return self.index.table.mask(filter) & self._live if filter else self._live

    def _kinds(self) -> np.ndarray | None:
        """Codes of the column that best tells kinds of sounds apart: few values, several items each."""
        best, fewest = None, 0.0
        for name in self.columns:
            column = self.index.table.table.column(name)
            if name in PLACE or not _is_text(column.type):
                continue
            codes = self.index.table.groups(name)
            distinct = len(np.unique(codes[self._live]))
            if 2 <= distinct <= max(2, self.rows // 2) and (best is None or distinct < fewest):
                best, fewest = codes, distinct
        return best

    def _column(self, name: str, dtype: type = np.float64) -> np.ndarray:
        return np.asarray(self.index.table.table.column(name).to_numpy(), dtype)


def spread(kinds: np.ndarray, count: int) -> np.ndarray:
    """An order of N rows in which any first `count` are as different as can be: all kinds in turn, evenly spaced.

    Args:
        kinds: int[N], equal numbers for rows of one kind.
        count: how many of them will be looked at.

    Returns:
        int64[N].
    """
    if not len(kinds):
        return np.zeros(0, np.int64)
    order = np.argsort(kinds, kind="stable")
    starts = np.flatnonzero(np.diff(kinds[order], prepend=kinds[order[0]] - 1))
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    by_turn = order[np.argsort(turn, kind="stable")]
    first = len(starts) if len(starts) > 1 else len(order)
    step = max(1, first // count)
    even = np.argsort(np.arange(first) % step, kind="stable")
    return np.concatenate([by_turn[:first][even], by_turn[first:]])


def _extent(files: np.ndarray, ends: np.ndarray) -> tuple[int, float]:
    """How many different files there are, and their hours (to the end of the last window)."""
    if not len(files):
        return 0, 0.0
    names, codes = np.unique(files, return_inverse=True)
    last = np.zeros(len(names))
    np.maximum.at(last, codes, np.nan_to_num(ends))
    return len(names), float(last.sum() / 3600)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _kind(kind: pa.DataType) -> str | None:
    if _is_text(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind):
        return "time"
    return None


def _facet(name: str, column: pa.ChunkedArray, mask: np.ndarray, limit: int) -> dict[str, Any] | None:
    kind = _kind(column.type)
    if kind is None:
        return None
    values = column.filter(pa.array(mask))
    nulls = values.null_count
    values = values.drop_null()
    counts = pc.value_counts(values)
    if pa.types.is_dictionary(counts.field("values").type):
        counts = pa.StructArray.from_arrays(
            [counts.field("values").dictionary_decode(), counts.field("counts")], ["values", "counts"]
        )
    facet: dict[str, Any] = {"column": name, "type": kind, "distinct": len(counts), "nulls": nulls, "values": []}
    if len(counts) <= MAX_DISTINCT:
        pairs = [(value, count) for value, count in zip(*(counts.field(i).to_pylist() for i in (0, 1)), strict=True)]
        pairs.sort(key=lambda pair: (-pair[1], str(pair[0])))
        facet["values"] = [{"value": value, "count": count} for value, count in pairs[:limit]]
    if kind in ("number", "time") and len(values):
        ends = pc.min_max(values)
        facet["min"], facet["max"] = ends["min"].as_py(), ends["max"].as_py()
    return facet


def json_default(value: Any) -> Any:
    """What orjson does not know by itself, as something that JSON can hold."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return str(value)
