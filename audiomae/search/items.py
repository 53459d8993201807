"""The items table of a release: one row per indexed vector, in the same order, with everything known about it.

`items.parquet` is for people and other tools; `items.arrow` is the same table as uncompressed Arrow IPC, which is
mapped rather than read: opening takes no time or memory whatever its size, and several processes share the pages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.config import nearest
from audiomae.errors import FilterError
from audiomae.search import filters

BATCH_ROWS = 65_536


class ItemsWriter:
    """Writes both forms of the items table as a context manager, in batches of `BATCH_ROWS` whatever it is given.

    Args:
        directory: where `items.parquet` and `items.arrow` go.
        schema: the columns of every table to come; columns that a table lacks become null.
    """

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._parquet = pq.ParquetWriter(directory / "items.parquet", schema, compression="zstd")
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
            self._parquet.write_table(batch)
            self._arrow.write_table(batch)

    def __enter__(self) -> "ItemsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush(self._waiting)
        self._parquet.close()
        self._arrow.close()


class Items:
    """A read-only items table, mapped from disk.

    Args:
        directory: the release directory with `items.arrow`.
    """

    def __init__(self, directory: Path) -> None:
        self._source = pa.memory_map(str(directory / "items.arrow"))
        self.table: pa.Table = pa.ipc.open_file(self._source).read_all()
        self._chunks = {name: self.table.column(name).chunks for name in self.table.column_names}
        self._encoded: dict[str, filters.Column] = {}
        self._batch_rows = len(self.table.column(0).chunk(0)) if len(self) else BATCH_ROWS  # all but the last

    @property
    def columns(self) -> list[str]:
        """The column names."""
        return list(self.table.column_names)

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows with these numbers, in the order asked for, as plain dicts of all (or these) columns."""
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        batches, places = np.divmod(wanted[order], self._batch_rows)
        edges = np.flatnonzero(np.diff(batches, prepend=-1))
        wanted_columns = self._chunks if columns is None else {name: self._chunks[name] for name in columns}
        values: dict[str, list[Any]] = {name: [] for name in wanted_columns}
        for start, stop in zip(edges, [*edges[1:], len(order)], strict=False):
            take = pa.array(places[start:stop])  # batch by batch: a take over many chunks copies all of them first
            for name, chunks in wanted_columns.items():
                values[name] += chunks[batches[start]].take(take).to_pylist()
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        return [{name: column[rank] for name, column in values.items()} for rank in ranks]

    def mask(self, where: Mapping[str, Any]) -> np.ndarray:
        """Which rows satisfy a filter (`audiomae.search.filters`): bool[N].

        Raises:
            FilterError: unknown column or operator, or a value that the column cannot hold.
        """
        types = {field.name: field.type for field in self.table.schema}
        found = filters.mask(where, types, self.column)
        return np.ones(len(self), dtype=bool) if found is None else found

    def column(self, name: str) -> filters.Column:
        """A column, ready to be compared; encoded when it is first asked for."""
        if name not in self._encoded:
            self._encoded[name] = filters.encode_column(self.table.column(name))
        return self._encoded[name]

    def groups(self, name: str) -> np.ndarray:
        """Which rows have the same value in a column: int[N], equal numbers for equal values (nulls are equal).

        Raises:
            FilterError: no such column, or one of lists or structs.
        """
        if name not in self.table.column_names:
            raise FilterError(f"cannot group by {name!r}: no such column{nearest(name, self.columns)}")
        column = self.column(name)
        if column.values is None:
            raise FilterError(f"cannot group by {name!r} (type {column.type}): expected a column of plain values")
        if column.dictionary is not None:
            return column.values
        groups = np.unique(column.values, return_inverse=True)[1]
        return groups if column.valid is None else np.where(column.valid, groups + 1, 0)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; missing columns become null."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
