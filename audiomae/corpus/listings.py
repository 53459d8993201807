"""CSV, JSONL and Parquet listings: rows with a `uri` and any other columns, streamed with one schema."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiomae.config import nearest
from audiomae.corpus import csv_listing, spool
from audiomae.corpus.columns import check_declared, check_names, declare, own_names, plain, to_text
from audiomae.corpus.folders import TABLE_ROWS, Entry, entry_of
from audiomae.corpus.notes import Notes
from audiomae.corpus.paths import is_s3, join
from audiomae.corpus.read_as import ReadAs
from audiomae.errors import ListingError
from audiomae.storage import open_seekable, open_stream

LOOKUP_THREADS = 32
ETAGS = ("content_id", "etag", "ETag")
TIMES_OF_CHANGE = ("last_modified", "LastModified", "mtime")


def tables(root: str, src: str, read_as: ReadAs) -> Callable[[Notes], Iterator[pa.Table]]:
    """A listing's rows as manifest tables: `uri`, `size`, `content_id`, then its own columns, as a function."""
    suffix = os.path.splitext(src)[1].lower()
    if suffix == ".parquet":
        rows = _parquet(src, read_as)
    elif suffix in (".jsonl", ".ndjson"):
        rows = spool.typed(src, lambda _: _jsonl(src), read_as)
    else:
        rows = csv_listing.tables(src, "\t" if suffix == ".tsv" else ",", read_as)

    def stream(notes: Notes) -> Iterator[pa.Table]:
        first = 1
        for table in rows(notes):
            for start in range(0, table.num_rows, TABLE_ROWS):
                yield _complete(root, src, table.slice(start, TABLE_ROWS), first + start)
            first += table.num_rows

    return stream


def _complete(root: str, src: str, table: pa.Table, first_row: int) -> pa.Table:
    """Check the uri column, look up sizes and content ids that the listing does not give, put columns in order."""
    if "uri" not in table.column_names:
        names = table.column_names
        raise ListingError(
            f"{src}: no column 'uri' among {names}{nearest('uri', names)}; rename the one that holds the paths to 'uri'"
        )
    uris = table["uri"]
    blank = pc.fill_null(pc.equal(pc.utf8_length(uris), 0), True)
    if pc.any(blank).as_py():
        row = first_row + pc.index(blank, True).as_py()
        raise ListingError(f"{src}: a row has no uri (row {row:,}); every row must name its file")
    names = own_names(table.column_names, keep=("uri",))
    others = {names[name]: table[name] for name in table.column_names if name != "uri"}
    return pa.table({"uri": uris, **_identity(root, table), **others})


def _identity(root: str, table: pa.Table) -> dict[str, pa.Array]:
    """`size` and `content_id`: as the listing says where it says both, else looked up (of objects: what it lacks)."""
    uris = table["uri"]
    sizes, contents = _given_sizes(table), _given_contents(table)
    if sizes is not None and contents is None:  # an object's size alone costs no request; a file's time costs nothing
        remote = pc.starts_with(uris, "s3://") if not is_s3(root) else pc.invert(_absolute(uris))
        contents = pc.if_else(remote, pc.binary_join_element_wise("size", sizes.cast(pa.string()), "-"), None)
    if sizes is None or contents is None:
        unknown = pa.array([True] * len(uris))
    else:
        unknown = pc.or_(pc.is_null(sizes), pc.is_null(contents))
    entries = _lookup(root, uris.filter(unknown).to_pylist())
    found_sizes = pa.array([entry.size for entry in entries], pa.int64())
    found = pa.array([entry.content_id for entry in entries], pa.string())
    if sizes is None or contents is None:
        return {"size": found_sizes, "content_id": found if contents is None else pc.coalesce(contents, found)}
    return {
        "size": pc.replace_with_mask(sizes.combine_chunks(), unknown.combine_chunks(), found_sizes),
        "content_id": pc.replace_with_mask(contents.combine_chunks(), unknown.combine_chunks(), found),
    }


def _given_sizes(table: pa.Table) -> pa.ChunkedArray | None:
    """A column `size` of bytes, if that is what it is: whole numbers, none negative."""
    if "size" not in table.column_names or not pa.types.is_integer(table["size"].type):
        return None
    if pc.any(pc.less(table["size"], 0)).as_py():
        return None
    return table["size"].cast(pa.int64())


def _given_contents(table: pa.Table) -> pa.ChunkedArray | None:
    for name in (*ETAGS, *TIMES_OF_CHANGE):
        if name in table.column_names:
            return to_text(table[name])
    return None


def _absolute(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.match_substring_regex(uris, r"^(/|file:)")


def _lookup(root: str, uris: list[str]) -> list[Entry]:
    if not any(is_s3(join(root, uri)) for uri in uris):
        return [entry_of(root, uri) for uri in uris]
    with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
        return list(pool.map(lambda uri: entry_of(root, uri), uris))


# --- the formats ------------------------------------------------------------------------------------------------------


def _parquet(src: str, read_as: ReadAs) -> Callable[[Notes], Iterator[pa.Table]]:
    def stream(_: Notes) -> Iterator[pa.Table]:
        try:
            with open_seekable(src) as file:
                reader = pq.ParquetFile(file)
                names = reader.schema_arrow.names
                check_names(src, names)
                check_declared(src, read_as.types, names)
                for batch in reader.iter_batches(TABLE_ROWS):
                    table = pa.table({name: plain(pa.chunked_array([batch.column(name)])) for name in names})
                    if "uri" in names:
                        table = table.set_column(names.index("uri"), "uri", to_text(table["uri"]))
                    yield declare(src, table, read_as.types)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise ListingError(f"{src}: not a readable Parquet file: {error}") from None

    return stream


def _jsonl(src: str) -> Iterator[list[dict[str, Any]]]:
    try:
        csv_listing.refuse_encoding(src)
        with open_stream(src) as file:
            numbered = enumerate(file, 1)
            while lines := list(islice(numbered, TABLE_ROWS)):
                yield [_json_row(src, number, line) for number, line in lines if line.strip()]
    except OSError as error:
        raise ListingError(f"{src}: {error}") from None


def _json_row(src: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = spool.parse_json(line)
    except (ValueError, RecursionError) as error:
        raise ListingError(f"{src}, line {number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ListingError(
            f'{src}, line {number}: expected an object like {{"uri": "a.wav"}}, got {type(row).__name__}'
        )
    return row
