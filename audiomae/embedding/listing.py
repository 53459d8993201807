"""The files of a corpus, each once and sorted by uri, in memory that does not grow with their number.

What a source gives is taken in runs of `RUN_ROWS`; each is sorted and, if there is more than one, written to a
temporary folder. They come back as consecutive partitions: runs that follow one another as they are (folders and
prefixes list in order), others cut at common uris, so that each partition is put together from its piece of every run.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.corpus.columns import own_names
from audiomae.errors import UserError
from audiomae.scratch import scratch_dir

RUN_ROWS = 1 << 18
BATCH_ROWS = 1 << 14
SAMPLE_ROWS = 64
HASHED_ROWS = 1 << 16
KEPT_NAMES = ("uri", "size", "content_id", "tar_offset")


class Listing:
    """A corpus, listed.

    Attributes:
        num_rows: files.
        duplicates: rows of one run left out because an earlier one has their uri.
        schema: of every partition.
    """

    def __init__(self, batches: Iterable[pa.Table], keep: Iterable[str] = KEPT_NAMES) -> None:
        """Take in a source's tables (all of one schema); columns that clash with ours, but for `keep`, are renamed.

        Raises:
            UserError: nothing was listed.
        """
        self._runs: list[_Run] = []
        self._folder = scratch_dir("listing", self)
        held: pa.Table | None = None
        for table in _runs_of(batches, frozenset(keep)):
            if held is not None:
                self._runs.append(_Stored(held, self._folder / f"{len(self._runs)}.arrow"))
            held = table
        if held is None:
            raise UserError("the corpus lists no audio files; check --corpus (a folder, glob, s3:// prefix or listing)")
        self.schema = held.schema
        many = bool(self._runs)
        self._runs.append(_Stored(held, self._folder / "last.arrow") if many else _Held(held))
        self._cuts = self._find_cuts()
        self.duplicates = sum(run.duplicates for run in self._runs)
        self.num_rows = sum(run.num_rows for run in self._runs) - self.duplicates

    def partitions(self) -> Iterator[pa.Table]:
        """All files, sorted by uri, in tables of up to about `RUN_ROWS` rows. May be called again."""
        last: str | None = None
        for low, high in self._ranges():
            table = self._piece(low, high)
            if not table.num_rows:
                continue
            first = _differs(table["uri"])
            first[0] = table["uri"][0].as_py() != last
            last = table["uri"][-1].as_py()
            yield table if first.all() else table.filter(pa.array(first))

    def between(self, low: str | None, high: str | None) -> pa.Table:
        """The files with `low` <= uri < `high`, sorted."""
        pieces = [self._piece(*span) for span in self._ranges(low, high)]
        table = pa.concat_tables([self.schema.empty_table(), *pieces]).combine_chunks()
        if low is not None:
            table = table.filter(pc.greater_equal(table["uri"], low))
        if high is not None:
            table = table.filter(pc.less(table["uri"], high))
        return table.filter(pa.array(_differs(table["uri"]))).combine_chunks() if table.num_rows else table

    def rows_of(self, uris: pa.Array | pa.ChunkedArray) -> pa.Table:
        """The rows of those of `uris` that are listed, sorted."""
        if not len(uris):
            return self.schema.empty_table()
        span = pc.min_max(uris).as_py()
        wanted = uris.combine_chunks() if isinstance(uris, pa.ChunkedArray) else uris
        pieces = (self._piece(*bounds) for bounds in self._ranges(span["min"], span["max"], closed=True))
        found = [piece.filter(pc.is_in(piece["uri"], wanted)) for piece in pieces]
        table = pa.concat_tables([self.schema.empty_table(), *found]).combine_chunks()
        return table.filter(pa.array(_differs(table["uri"]))) if table.num_rows else table

    def table(self) -> pa.Table:
        """All of it in memory: for what looks at the corpus as a whole."""
        return pa.concat_tables(self.partitions()).combine_chunks()

    def sample(self, most: int = SAMPLE_ROWS) -> pa.Table:
        """Up to `most` files, spread evenly."""
        many = len(self._runs) > 1
        table = pa.concat_tables([run.sample() for run in self._runs]).sort_by("uri") if many else self.table()
        return table.take(pa.array(np.unique(np.linspace(0, table.num_rows - 1, most).astype(np.int64))))

    def _find_cuts(self) -> list[str | None]:
        """Uris at which runs that overlap are cut; none where each begins after the one before has ended."""
        if all(one.last < other.first for one, other in zip(self._runs[:-1], self._runs[1:], strict=True)):
            return []
        marks = sorted(mark for run in self._runs for mark in run.marks)
        per_partition = max(1, RUN_ROWS // BATCH_ROWS)
        return [*dict.fromkeys(marks[per_partition::per_partition])]

    def _ranges(
        self, low: str | None = None, high: str | None = None, closed: bool = False
    ) -> Iterator[tuple[str | None, str | None]]:
        """Consecutive spans [begin, end) of uris that together cover all of [low, high) and are read one by one."""
        cuts = self._cuts or [run.first for run in self._runs[1:]]
        for begin, end in zip([None, *cuts], [*cuts, None], strict=True):
            before = high is not None and begin is not None and (begin > high or (begin == high and not closed))
            after = low is not None and end is not None and end <= low
            if not (before or after):
                yield begin, end

    def _piece(self, low: str | None, high: str | None) -> pa.Table:
        tables = [
            piece
            for run in self._runs
            if (high is None or run.first < high) and (low is None or run.last >= low)
            if (piece := run.read(low, high)).num_rows
        ]
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables([self.schema.empty_table(), *tables]).sort_by("uri").combine_chunks()


def _runs_of(batches: Iterable[pa.Table], keep: frozenset[str]) -> Iterator[pa.Table]:
    """The tables of a source, put together to sorted runs."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in batches:
        names = own_names(table.column_names, keep=keep)
        waiting.append(table.rename_columns([names[name] for name in table.column_names]))
        rows += table.num_rows
        if rows >= RUN_ROWS:
            yield _sorted(waiting)
            waiting, rows = [], 0
    if rows:
        yield _sorted(waiting)


def _sorted(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    uris = table["uri"]
    if pc.any(pc.less(uris.slice(1), uris.slice(0, table.num_rows - 1))).as_py():
        table = table.sort_by("uri").combine_chunks()  # stable: of those with one uri the first stays the first
    return table


def _differs(uris: pa.ChunkedArray) -> np.ndarray:
    """bool[N]: whether a uri differs from the one before."""
    first = np.ones(len(uris), bool)
    first[1:] = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1)).to_numpy(zero_copy_only=False)
    return first


class _Run:
    """Sorted rows: `first` and `last` uri, and the uri at every `BATCH_ROWS`-th row (`marks`)."""

    def __init__(self, table: pa.Table) -> None:
        uris = table["uri"]
        self.num_rows = table.num_rows
        self.duplicates = int((~_differs(uris)).sum())
        self.first, self.last = uris[0].as_py(), uris[-1].as_py()
        self.marks: list[str] = uris.take(pa.array(range(0, table.num_rows, BATCH_ROWS))).to_pylist()
        rows = np.unique(np.linspace(0, table.num_rows - 1, SAMPLE_ROWS).astype(np.int64))
        self._sample = table.take(pa.array(rows))

    def sample(self) -> pa.Table:
        """Some rows, spread evenly."""
        return self._sample

    def read(self, low: str | None, high: str | None) -> pa.Table:
        """The rows with `low` <= uri < `high`."""
        raise NotImplementedError


class _Held(_Run):
    """The only run, in memory."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__(table)
        self._table = table

    def read(self, low: str | None, high: str | None) -> pa.Table:
        return self._table


class _Stored(_Run):
    """A run in a file, of which only the batches asked for are read."""

    def __init__(self, table: pa.Table, path: Path) -> None:
        super().__init__(table)
        self._path = path
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)

    def read(self, low: str | None, high: str | None) -> pa.Table:
        begin = 0 if low is None else max(0, bisect_left(self.marks, low) - 1)
        end = len(self.marks) if high is None else bisect_left(self.marks, high)
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            batches = [reader.get_batch(number) for number in range(begin, end)]
            table = pa.Table.from_batches(batches, reader.schema)
        if low is not None:
            table = table.filter(pc.greater_equal(table["uri"], low))
        return table.filter(pc.less(table["uri"], high)) if high is not None else table


class ManifestHash:
    """SHA-256 over columns of every file, in order, however they are cut into tables."""

    def __init__(self) -> None:
        self._digest: Any = None
        self._waiting: pa.Table | None = None

    def update(self, table: pa.Table) -> None:
        """Take the next rows into account."""
        if self._digest is None:
            self._digest = hashlib.sha256("\x1f".join(table.column_names).encode())
        table = pa.concat_tables([self._waiting, table]) if self._waiting is not None else table
        whole = table.num_rows - table.num_rows % HASHED_ROWS
        for start in range(0, whole, HASHED_ROWS):
            self._add(table.slice(start, HASHED_ROWS))
        self._waiting = table.slice(whole).combine_chunks()

    def hexdigest(self) -> str:
        """Of all rows; none may follow."""
        if self._waiting is not None and self._waiting.num_rows:
            self._add(self._waiting)
        return str(self._digest.hexdigest())

    def _add(self, table: pa.Table) -> None:
        for column in table.columns:
            array = column.combine_chunks()
            array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
            missing = pc.is_null(array).to_numpy(zero_copy_only=False)
            self._digest.update(np.packbits(missing).tobytes() if missing.any() else b"-")
            self._digest.update(_content(array))


def _content(array: pa.Array) -> bytes:
    """The values, missing ones as empty or zero."""
    kind = array.type
    if pa.types.is_string(kind):
        filled = pc.fill_null(array, "")
        lengths = pc.binary_length(filled).to_numpy(zero_copy_only=False)
        starts = np.frombuffer(filled.buffers()[1], np.int32)[filled.offset : filled.offset + len(filled) + 1]
        data = filled.buffers()[2]
        text = data[int(starts[0]) : int(starts[-1])].to_pybytes() if data is not None else b""
        return bytes(lengths.astype("<i4").tobytes() + text)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        zero = False if pa.types.is_boolean(kind) else 0
        return bytes(np.ascontiguousarray(pc.fill_null(array, zero).to_numpy(zero_copy_only=False)).tobytes())
    return repr(array.to_pylist()).encode()
