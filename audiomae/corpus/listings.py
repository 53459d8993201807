"""CSV, JSONL and Parquet listings: rows with a `uri` and any other columns, streamed with one schema."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from audiomae.corpus.folders import TABLE_ROWS, entry_of
from audiomae.corpus.sources import is_s3
from audiomae.errors import UserError
from audiomae.storage import to_path

RESERVED = ("id", "start_s", "end_s", "embedding")
"""Column names of the embedding table; a listing's own are renamed to `listing_<name>`."""
LOOKUP_THREADS = 32


def tables(root: str, src: str) -> Callable[[], Iterator[pa.Table]]:
    """A listing's rows as manifest tables: `uri`, `size`, `content_id`, then its own columns, as a function."""
    suffix = os.path.splitext(src)[1].lower()
    if suffix == ".parquet":
        rows = _parquet(src)
    elif suffix in (".jsonl", ".ndjson"):
        rows = uniform(lambda: _jsonl(src))
    else:
        rows = _csv(src, "\t" if suffix == ".tsv" else ",")

    def stream() -> Iterator[pa.Table]:
        seen = UniqueUris(src)
        for table in rows():
            for start in range(0, table.num_rows, TABLE_ROWS):
                yield seen.check(_complete(root, src, table.slice(start, TABLE_ROWS)))
        seen.close()

    return stream


class UniqueUris:
    """Refuses a uri that comes twice (its clips would share ids) at 8 bytes of memory per row."""

    def __init__(self, src: str) -> None:
        self._src = src
        self._hashes: list[np.ndarray] = []

    def check(self, table: pa.Table) -> pa.Table:
        """Note the uris of a table, which is given back."""
        uris = table["uri"].to_pylist()
        self._hashes.append(np.fromiter(map(hash, uris), np.int64, len(uris)))
        return table

    def close(self) -> None:
        """Compare all that was noted."""
        hashes = np.concatenate(self._hashes) if self._hashes else np.empty(0, np.int64)
        extra = len(hashes) - len(np.unique(hashes))
        if extra:
            raise UserError(f"{self._src}: {extra} rows repeat the uri of another row; a uri may be listed once")


def _complete(root: str, src: str, table: pa.Table) -> pa.Table:
    """Check the uri column, look up sizes and content ids that the listing does not give, put columns in order."""
    if "uri" not in table.column_names:
        names = table.column_names
        raise UserError(f"{src}: no column 'uri' among {names}; rename the one that holds the paths to 'uri'")
    table = table.rename_columns([f"listing_{name}" if name in RESERVED else name for name in table.column_names])
    uris = table["uri"].cast(pa.string())
    if uris.null_count or pc.any(pc.equal(pc.utf8_length(uris), 0)).as_py():
        raise UserError(f"{src}: a row has no uri; every row must name its file")
    if "size" not in table.column_names or "content_id" not in table.column_names:
        lookup = [entry_of(root, uri) for uri in uris.to_pylist()] if not is_s3(root) else _lookup_s3(root, uris)
        found = {
            "size": pa.array([entry.size for entry in lookup], pa.int64()),
            "content_id": pa.array([entry.content_id for entry in lookup], pa.string()),
        }
    else:
        found = {"size": table["size"].cast(pa.int64()), "content_id": table["content_id"].cast(pa.string())}
    others = {name: table[name] for name in table.column_names if name not in ("uri", "size", "content_id")}
    return pa.table({"uri": uris, **found, **others})


def _lookup_s3(root: str, uris: pa.ChunkedArray) -> list[Any]:
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return list(pool.map(lambda uri: entry_of(root, uri), uris.to_pylist()))


# --- the formats ------------------------------------------------------------------------------------------------------


def _parquet(src: str) -> Callable[[], Iterator[pa.Table]]:
    def stream() -> Iterator[pa.Table]:
        try:
            with to_path(src).open("rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(TABLE_ROWS):
                    yield pa.table(batch)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{src}: not a readable Parquet file: {error}") from None

    return stream


def _csv(src: str, delimiter: str) -> Callable[[], Iterator[pa.Table]]:
    """CSV is read twice: once to find the narrowest type that fits the whole of each column, once for the rows."""

    def text() -> Iterator[pa.Table]:
        parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        try:
            with to_path(src).open("rb") as file:
                names = pa.csv.open_csv(file, parse_options=parse).schema.names
            convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
            with to_path(src).open("rb") as file:
                for batch in pa.csv.open_csv(file, parse_options=parse, convert_options=convert):
                    yield pa.table(batch)
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            raise UserError(f"{src}: not a readable CSV file: {error}") from None

    @cache
    def schema() -> pa.Schema:
        types: dict[str, list[pa.DataType]] = {}
        for table in text():
            for name in table.column_names:
                left = types.setdefault(name, [pa.int64(), pa.float64()] if name != "uri" else [])
                types[name] = [kind for kind in left if _fits(table[name], kind)]
        return pa.schema([(name, left[0] if left else pa.string()) for name, left in types.items()])

    def stream() -> Iterator[pa.Table]:
        for table in text():
            yield table.cast(schema())

    return stream


def _fits(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether every value is such a number; `007` is a name, not a number."""
    if pc.any(pc.match_substring_regex(column, r"^[+-]?0[0-9]|^\s|\s$")).as_py():
        return False
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _jsonl(src: str) -> Iterator[pa.Table]:
    try:
        with to_path(src).open("rb") as file:
            numbered = enumerate(file, 1)
            while lines := list(islice(numbered, TABLE_ROWS)):
                rows = [_json_row(src, number, line) for number, line in lines if line.strip()]
                yield rows_to_table(rows)
    except OSError as error:
        raise UserError(f"{src}: {error}") from None


def _json_row(src: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{src}, line {number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{src}, line {number}: expected an object like {{"uri": "a.wav"}}, got {type(row).__name__}')
    return row


# --- rows whose types are not known in advance ------------------------------------------------------------------------


def rows_to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Dicts as a table of int64, float64, bool and string columns; nested values become JSON text."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({bool}, {str}):
        try:
            return pa.array(values, pa.float64() if float in kinds else None)
        except (pa.ArrowInvalid, OverflowError):
            pass  # an integer beyond 64 bits
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def uniform(tables_of: Callable[[], Iterator[pa.Table]]) -> Callable[[], Iterator[pa.Table]]:
    """Tables whose columns and types vary, as tables of one schema.

    The source is read once and its tables spooled to a temporary folder, so that the widest schema is known before the
    first table is given; later calls read the spool.
    """
    state: dict[str, Any] = {}

    def spool() -> None:
        folder = tempfile.TemporaryDirectory(prefix="audiomae-listing-")
        fields: dict[str, pa.DataType] = {}
        count = 0
        for count, table in enumerate(tables_of(), 1):
            for field in table.schema:
                fields[field.name] = _wider(fields.get(field.name, pa.null()), field.type)
            pq.write_table(table, Path(folder.name) / f"{count}.parquet")
        types = [(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in fields.items()]
        state.update(folder=folder, schema=pa.schema(types), count=count)

    def stream() -> Iterator[pa.Table]:
        if not state:
            spool()
        for number in range(1, state["count"] + 1):
            table = pq.read_table(Path(state["folder"].name) / f"{number}.parquet")
            columns = [
                table[field.name].cast(field.type)
                if field.name in table.column_names
                else pa.nulls(table.num_rows, field.type)
                for field in state["schema"]
            ]
            yield pa.table(columns, schema=state["schema"])

    return stream


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if {one, other} == numbers else pa.string()
