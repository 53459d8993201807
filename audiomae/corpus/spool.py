"""Rows whose columns and types are known only once the last was seen: spooled as they come, typed at the end."""

import json
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.corpus.columns import EXACT_FLOAT_INTS, check_declared, clean_text, declare, to_text
from audiomae.corpus.notes import Notes
from audiomae.corpus.read_as import ReadAs
from audiomae.scratch import scratch_dir

Row = dict[str, Any]
LONGEST_EXACT_FLOAT = 16  # characters: at most 15 digits
INT64 = range(-(2**63), 2**63)


def typed(
    src: str, chunks_of: Callable[[Notes], Iterator[list[Row]]], read_as: ReadAs
) -> Callable[[Notes], Iterator[pa.Table]]:
    """Chunks of dicts as tables of one schema: int64, float64, bool or text (nested values as JSON text).

    The source is read once; later calls read what was spooled to a temporary folder.
    """
    state: list[_Spool] = []

    def stream(notes: Notes) -> Iterator[pa.Table]:
        if not state:
            spool = _Spool({"uri", *(name for name, kind in read_as.types.items() if kind == "text")})
            spool.fill(chunks_of(spool.notes))
            if spool.count:
                check_declared(src, read_as.types, spool.kinds)
            state.append(spool)
        notes.take(state[0].notes)
        for table in state[0].tables():
            yield declare(src, table, read_as.types)

    return stream


def parse_json(text: str | bytes) -> Any:
    """JSON as Python values. Numbers that a double would change stay text.

    Raises:
        ValueError: not JSON, or an object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_object, parse_float=_exact)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice; rename one, so that no value is lost")
    return value


def _exact(text: str) -> float | str:
    value = float(text)
    if len(text) <= LONGEST_EXACT_FLOAT:
        return value if abs(value) != float("inf") else text
    try:
        return value if Decimal(repr(value)) == Decimal(text) else text
    except InvalidOperation:
        return text


class _Spool:
    """A temporary folder of Parquet files, one a chunk, and the kinds of values that each column has held."""

    def __init__(self, as_text: set[str]) -> None:
        self.kinds: dict[str, set[str]] = {}
        self.notes = Notes()
        self.count = 0
        self._as_text = as_text
        self._folder = scratch_dir("listing", self)

    def fill(self, chunks: Iterable[list[Row]]) -> None:
        """Take all rows in."""
        for rows in chunks:
            if not rows:
                continue
            self.count += 1
            names = dict.fromkeys(name for row in rows for name in row)
            # a row without any name cannot be stored as such: its chunk has a column of nulls for it
            columns = {clean_text(name): self._column(name, [row.get(name) for row in rows]) for name in names}
            pq.write_table(pa.table(columns or {"uri": pa.nulls(len(rows), pa.string())}), self._file(self.count))
        for name, kinds in self.kinds.items():
            if (
                len({kind if kind in ("bool", "text") else "number" for kind in kinds}) > 1
                and name not in self._as_text
            ):
                self.notes.add("columns of mixed kinds of values (text, numbers, true or false) kept as text", name)

    def tables(self) -> Iterator[pa.Table]:
        """All rows, with one schema."""
        schema = pa.schema([(name, self._type(name)) for name in self.kinds])
        for number in range(1, self.count + 1):
            table = pq.read_table(self._file(number))
            columns = []
            for field in schema:
                if field.name not in table.column_names:
                    columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
                    continue
                column = table[field.name]
                columns.append(to_text(column) if pa.types.is_string(field.type) else column.cast(field.type))
            yield pa.table(columns, schema=schema)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.parquet"

    def _column(self, name: str, values: list[Any]) -> pa.Array:
        kinds = {_kind(value) for value in values if value is not None}
        self.kinds.setdefault(clean_text(name), set()).update(kinds)
        one = kinds.pop() if len(kinds) == 1 and name not in self._as_text else None
        if one == "big" or kinds == {"int", "big"}:
            one = "int"
        if one in ("int", "float", "bool"):
            return pa.array(values, {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}[one])
        return pa.array([None if value is None else _as_text(value) for value in values], pa.string())

    def _type(self, name: str) -> pa.DataType:
        kinds = self.kinds[name]
        if not kinds or name in self._as_text:
            return pa.string()
        if kinds == {"bool"}:
            return pa.bool_()
        if kinds <= {"int", "big"}:
            return pa.int64()
        return pa.float64() if kinds <= {"int", "float"} else pa.string()


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "text" if value not in INT64 else "big" if abs(value) > EXACT_FLOAT_INTS else "int"
    return "float" if isinstance(value, float) else "text"


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return clean_text(value)
    return clean_text(json.dumps(value, ensure_ascii=False))
