"""The items of a release: one row per indexed vector, in the same order, with everything known about it.

In each segment `items.parquet` is for people and other tools; `items.arrow` is the same table as uncompressed Arrow
IPC, which is mapped rather than read: opening takes no time or memory whatever its size, and several processes share
the pages. `column-*.arrow` are its columns once more, each as one flat array that filters compare (text as codes into
its sorted distinct values), mapped too.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.config import nearest
from audiomae.errors import FilterError
from audiomae.search import filters
from audiomae.search.filters import Column

FEW = 32  # rows that are read value by value: Arrow's calls are only worth making for more
BATCH_ROWS = 65_536
VALUE, VALID = "value", "valid"


class ItemsWriter:
    """Writes both forms of the items table as a context manager, in batches of `BATCH_ROWS` whatever it is given.

    Args:
        directory: where `items.parquet` and `items.arrow` go.
        schema: the columns of every table to come; columns that a table lacks become null.
        parquet: whether `items.parquet` is written too.
    """

    def __init__(self, directory: Path, schema: pa.Schema, parquet: bool = True) -> None:
        self.schema = schema
        path = directory / "items.parquet"
        self._parquet = pq.ParquetWriter(path, schema, compression="zstd") if parquet else None
        self._arrow = pa.ipc.new_file(str(directory / "items.arrow"), schema)
        self._waiting = schema.empty_table()

    def write(self, table: pa.Table) -> None:
        """Append the rows of `table`."""
        self._waiting = pa.concat_tables([self._waiting, conform(table, self.schema)])
        whole = self._waiting.num_rows - self._waiting.num_rows % BATCH_ROWS
        self._flush(self._waiting.slice(0, whole))
        self._waiting = self._waiting.slice(whole)

    def _flush(self, table: pa.Table) -> None:
        for start in range(0, table.num_rows, BATCH_ROWS):
            batch = table.slice(start, BATCH_ROWS).combine_chunks()
            if self._parquet is not None:
                self._parquet.write_table(batch)
            self._arrow.write_table(batch)

    def __enter__(self) -> "ItemsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush(self._waiting)
        if self._parquet is not None:
            self._parquet.close()
        self._arrow.close()


def write_columns(directory: Path) -> None:
    """Write `column-*.arrow` for the items in `directory`, one column at a time."""
    table = Items(directory).table
    for number, name in enumerate(table.column_names):
        if not (filters.is_flat(kind := filters.value_type(table.schema.field(name).type)) or filters.is_coded(kind)):
            continue
        column = filters.encode_column(table.column(name))
        assert column.values is not None
        values = pa.array(column.values)
        if column.dictionary is not None:  # the first place stands for null
            first = pa.array([None], column.dictionary.type)
            values = pa.DictionaryArray.from_arrays(values, pa.concat_arrays([first, column.dictionary]))
        arrays = {VALUE: values} | ({} if column.valid is None else {VALID: pa.array(column.valid.view(np.uint8))})
        batch = pa.record_batch(arrays)
        with pa.ipc.new_file(str(directory / _column_file(number)), batch.schema) as writer:
            writer.write_batch(batch)


def _column_file(number: int) -> str:
    return f"column-{number:03d}.arrow"


class Items:
    """The items of one segment, mapped from disk and read-only.

    Args:
        directory: the segment, with `items.arrow`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._source = pa.memory_map(str(directory / "items.arrow"))
        self.table: pa.Table = pa.ipc.open_file(self._source).read_all()
        self._batches = self.table.to_batches()
        self._columns = [dict(zip(batch.schema.names, batch.columns, strict=True)) for batch in self._batches]
        self._encoded: dict[str, Column] = {}
        self._batch_rows = len(self._batches[0]) if len(self) else BATCH_ROWS  # all but the last

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows with these numbers, in the order asked for, as plain dicts of all (or these) columns."""
        wanted = np.asarray(rows, np.int64)
        if len(wanted) <= FEW:
            return [self._row(row, columns) for row in wanted.tolist()]
        order = np.argsort(wanted, kind="stable")
        batches, places = np.divmod(wanted[order], self._batch_rows)
        edges = np.flatnonzero(np.diff(batches, prepend=-1))
        found: list[dict[str, Any]] = []
        for start, stop in zip(edges, [*edges[1:], len(order)], strict=False):
            batch = self._batches[batches[start]]  # one by one: a take over many copies all of them first
            if columns is not None:
                batch = batch.select([name for name in columns if name in batch.schema.names])
            found += batch.take(pa.array(places[start:stop])).to_pylist()
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        return [found[rank] for rank in ranks]

    def _row(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        batch, place = divmod(row, self._batch_rows)
        known = self._columns[batch]
        if columns is None:
            return {name: column[place].as_py() for name, column in known.items()}
        return {name: known[name][place].as_py() for name in columns if name in known}

    def column(self, name: str) -> Column:
        """A column, ready to be compared: as it was written, or made when it is first asked for."""
        if name not in self._encoded:
            self._encoded[name] = self._read_column(name)
        return self._encoded[name]

    def _read_column(self, name: str) -> Column:
        if name not in self.table.column_names:
            return Column(pa.null(), None, source=pa.nulls(len(self)))
        path = self._directory / _column_file(self.table.column_names.index(name))
        if not path.exists():
            return filters.encode_column(self.table.column(name))
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        kind = filters.value_type(self.table.schema.field(name).type)
        values = batch.column(VALUE)
        valid = batch.column(VALID).to_numpy().view(bool) if VALID in batch.schema.names else None
        if pa.types.is_dictionary(values.type):
            return Column(kind, values.indices.to_numpy(), dictionary=values.dictionary.slice(1))
        return Column(kind, values.to_numpy(zero_copy_only=False), valid)


class ItemsTable:
    """The items of all segments of a release as one table.

    Args:
        directories: the segments, in the order of their rows.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self.parts = [Items(directory) for directory in directories]
        schemas = [part.table.schema.remove_metadata() for part in self.parts]
        self.schema: pa.Schema = pa.unify_schemas(schemas, promote_options="permissive")
        self.starts = np.cumsum([0, *map(len, self.parts)])

    @property
    def columns(self) -> list[str]:
        """The column names."""
        return list(self.schema.names)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def table(self) -> pa.Table:
        """All rows as one Arrow table, over the same mapped memory; columns that a segment lacks are null."""
        return pa.concat_tables([conform(part.table, self.schema) for part in self.parts])

    def rows(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows with these numbers, in the order asked for, as plain dicts of all (or these) columns."""
        wanted = np.asarray(rows, np.int64)
        if len(self.parts) == 1:
            return self.parts[0].rows(wanted, columns)
        numbers = np.searchsorted(self.starts, wanted, side="right") - 1
        found: list[dict[str, Any]] = [{}] * len(wanted)
        blank = dict.fromkeys(self.columns if columns is None else columns)
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            here = self.parts[number].rows(wanted[mine] - self.starts[number], columns)
            for place, row in zip(mine, here, strict=True):
                found[place] = blank | row
        return found

    def mask(self, where: Mapping[str, Any]) -> np.ndarray:
        """Which rows satisfy a filter (`audiomae.search.filters`): bool[N].

        Raises:
            FilterError: unknown column or operator, or a value that the column cannot hold.
        """
        types = {field.name: field.type for field in self.schema}
        filters.check(where, types)
        masks = []
        for part in self.parts:
            found = filters.evaluate(where, types, part.column)
            masks.append(np.ones(len(part), bool) if found is None else found)
        return masks[0] if len(masks) == 1 else np.concatenate(masks)

    def groups(self, name: str) -> np.ndarray:
        """Which rows have the same value in a column: int[N], equal numbers for equal values (nulls are equal).

        Raises:
            FilterError: no such column, or one of lists or structs.
        """
        if name not in self.columns:
            raise FilterError(f"cannot group by {name!r}: no such column{nearest(name, self.columns)}")
        kind = filters.value_type(self.schema.field(name).type)
        if not (filters.is_coded(kind) or filters.is_flat(kind)):
            raise FilterError(f"cannot group by {name!r} (type {kind}): expected a column of plain values")
        columns = [part.column(name) for part in self.parts]
        if filters.is_coded(kind):
            return self._joined_codes(columns)
        values = [np.zeros(len(p), np.int64) if c.values is None else c.values for p, c in zip(self.parts, columns)]  # noqa: B905
        nulls = np.concatenate([column.nulls() for column in columns])
        groups = np.unique(np.concatenate(values), return_inverse=True)[1]
        return np.where(nulls, 0, groups + 1)

    def _joined_codes(self, columns: Sequence[Column]) -> np.ndarray:
        if len(columns) == 1 and columns[0].values is not None:
            return columns[0].values
        known = [column.dictionary for column in columns if column.dictionary is not None]
        joined = pa.chunked_array(known).dictionary_encode() if known else None
        ranks = iter(joined.chunks if joined is not None else [])
        groups = []
        for part, column in zip(self.parts, columns, strict=True):
            if column.values is None or column.dictionary is None:
                groups.append(np.zeros(len(part), np.int64))
            elif len(column.dictionary) == 0:
                groups.append(np.zeros(len(part), np.int64))
                next(ranks)
            else:
                groups.append(np.concatenate([[0], next(ranks).indices.to_numpy() + 1])[column.values])
        return np.concatenate(groups)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; missing columns become null."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
