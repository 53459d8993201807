"""Tables of an embedding folder: their schemas, and Parquet that every reader understands."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.config import StrictConfig

RESERVED_COLUMNS = ("id", "uri", "start_s", "end_s", "embedding")
DECODE_NOTE = "decode_note"
FAILED, DAMAGED = "failed", "damaged"
FAILURE_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("stage", pa.string()),
        ("error_class", pa.string()),
        ("message", pa.string()),
        ("kind", pa.string()),  # FAILED: the input gave no embedding | DAMAGED: a lost span of one that was embedded
    ]
)
SILENT_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("reason", pa.string()),
        ("peak_db", pa.float64()),
    ]
)
READ_AHEAD = 4

Value = TypeVar("Value")


class EmbedSettings(StrictConfig):
    """What decides the vectors of a corpus: two runs with equal settings give equal rows.

    A setting that came later defaults to what was done before it, so that older folders stay what they are.

    Attributes:
        silence: `skip` = silent windows are rows of `silent/` and get no vector; `keep` = they are embedded too.
        silence_db: a window whose peak lies below this (dBFS) is silent.
        silence_range_db: so is one whose peak lies this far below the loudest window of its file (or segment).
        last_window: `whole` = a file's last window is moved back until it is full; `partial` = it is cut short.
    """

    fingerprint: str
    dim: int
    sample_rate: int
    mode: Literal["windows", "file"]
    window_s: float
    hop_s: float
    vector_dtype: Literal["float32", "float16"] = "float32"
    silence: Literal["keep", "skip"] = "keep"
    silence_db: float = -60.0
    silence_range_db: float = 50.0
    last_window: Literal["partial", "whole"] = "partial"
    on_damage: Literal["salvage", "fail"] = "salvage"
    channel: str = "mix"


def embedding_schema(settings: EmbedSettings, extra: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of an embedding shard: id, uri, start_s, end_s, embedding `[dim]`, then the manifest's own columns.

    A shard with a window that was not mixed in the plain way has `DECODE_NOTE` (string) as its last column.
    """
    vector = pa.list_(pa.float16() if settings.vector_dtype == "float16" else pa.float32(), settings.dim)
    own = [("id", pa.int64()), ("uri", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())]
    return pa.schema([pa.field(*field) for field in own] + [pa.field("embedding", vector)] + list(extra))


def vectors_to_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """`float[N, D]` as a column every Parquet reader understands (numpy's own becomes an extension type)."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def column_to_vectors(column: pa.ChunkedArray) -> np.ndarray:
    """An embedding column as `float32[N, D]`."""
    dim = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) for chunk in column.chunks]
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros((0, dim), np.float32)


def with_kind(failures: pa.Table) -> pa.Table:
    """Failure rows in today's schema: those of older folders, which knew no damaged inputs, are all `failed`."""
    if "kind" not in failures.column_names:
        failures = failures.append_column("kind", pa.array([FAILED] * failures.num_rows, pa.string()))
    return failures.select(FAILURE_SCHEMA.names).cast(FAILURE_SCHEMA)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    # vectors do not compress and have no useful dictionary; everything else does
    dictionary = [name for name in table.column_names if name != "embedding"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=dictionary, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file."""
    return pq.read_table(pa.BufferReader(data), columns=list(columns) if columns is not None else None)


def map_ahead(function: Callable[[Any], Value], items: Iterable[Any], ahead: int = READ_AHEAD) -> Iterator[Value]:
    """`map` in a few threads, in order, with no more than `ahead` results waiting."""
    pending: deque[Future[Value]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
