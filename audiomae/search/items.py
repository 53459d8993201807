"""The items table of a release: one row per indexed vector, in the same order, with everything known about it.

`items.parquet` is for people and other tools; `items.arrow` is the same table as uncompressed Arrow IPC, which is
mapped rather than read: opening takes no time or memory whatever its size, and several processes share the pages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiomae.config import nearest
from audiomae.errors import FilterError

BATCH_ROWS = 65_536
_COMPARE = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}


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
        self._batch_rows = len(self.table.column(0).chunk(0)) if len(self) else BATCH_ROWS  # all but the last

    @property
    def columns(self) -> list[str]:
        """The column names."""
        return list(self.table.column_names)

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The rows with these numbers, in the order asked for, as plain dicts."""
        places = [divmod(int(row), self._batch_rows) for row in rows]
        # cell by cell: a take over many chunks copies all of them first
        return [{name: chunks[b][i].as_py() for name, chunks in self._chunks.items()} for b, i in places]

    def mask(self, where: Mapping[str, Any]) -> np.ndarray:
        """Which rows satisfy every condition of a filter: bool[N].

        Args:
            where: `{"column": value | {"in": [...]} | {"gt" | "gte" | "lt" | "lte": x, ...}}`, all ANDed. `None` as
                the value finds rows without one.

        Raises:
            FilterError: unknown column or operator, or a value of another type than the column.
        """
        if not isinstance(where, Mapping):
            raise FilterError(f'a filter is an object like {{"label": "rain"}}, got {type(where).__name__}')
        mask = np.ones(len(self), dtype=bool)
        for column, condition in where.items():
            if column not in self.table.column_names:
                raise FilterError(f"unknown filter column {column!r}{nearest(column, self.columns)}")
            mask &= self._condition(column, condition)
        return mask

    def _condition(self, column: str, condition: Any) -> np.ndarray:
        values = self.table.column(column)
        if pa.types.is_dictionary(values.type):
            values = pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks], values.type.value_type)
        operators = condition if isinstance(condition, dict) else {"in": [condition]}
        mask = np.ones(len(self), dtype=bool)
        for name, operand in operators.items():
            try:
                if name == "in":
                    if not isinstance(operand, list):
                        raise FilterError(f"filter on {column!r}: 'in' needs a list, got {operand!r}")
                    found = pc.is_in(values, value_set=pa.array(operand).cast(values.type))
                elif name in _COMPARE:
                    found = _COMPARE[name](values, pa.scalar(operand).cast(values.type))
                else:
                    raise FilterError(
                        f"filter on {column!r}: unknown operator {name!r}{nearest(name, ['in', *_COMPARE])}"
                    )
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                raise FilterError(
                    f"filter on {column!r} (type {values.type}): {name} {operand!r} does not fit: {error}"
                ) from None
            mask &= found.fill_null(False).to_numpy(zero_copy_only=False)
        return mask


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`; missing columns become null."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
