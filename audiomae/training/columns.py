"""Columns of text as numbers: what is asked of a corpus of many millions of clips without an object for each."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Texts: TypeAlias = "pa.ChunkedArray | pa.Array | Sequence[str | None]"
CHUNK_ROWS = 1 << 16
MISSING = -1


def as_column(values: Texts) -> pa.ChunkedArray:
    """The values as an Arrow column."""
    if isinstance(values, pa.ChunkedArray):
        return values
    return pa.chunked_array([values if isinstance(values, pa.Array) else pa.array(values, pa.string())])


def coded(values: Texts) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """(distinct values that occur, int32[N] number of each row's value among them, `MISSING` for none)."""
    column = as_column(values)
    known = pa.types.is_dictionary(column.type)
    encoded = column.unify_dictionaries() if known else column.dictionary_encode()  # all chunks share the dictionary
    if not encoded.num_chunks:
        return pa.array([], column.type.value_type if known else column.type), np.zeros(0, np.int32)
    names = encoded.chunk(encoded.num_chunks - 1).dictionary
    filled = [pc.fill_null(part.indices, MISSING).to_numpy(zero_copy_only=False) for part in encoded.chunks]
    codes = np.concatenate(filled).astype(np.int32, copy=False)
    if known:  # of names that were given, some may not occur
        used = np.flatnonzero(np.bincount(codes + 1, minlength=len(names) + 1)[1:])
        number = np.full(len(names) + 1, MISSING, np.int32)
        number[used] = np.arange(len(used))
        names, codes = names.take(pa.array(used)), number[codes]  # the last number is for what is missing
    return names, codes


def texts_of(names: pa.Array, codes: npt.NDArray[np.int32]) -> pa.ChunkedArray:
    """The column that `coded` made these of, or of names that took their place: numbers of a dictionary."""
    indices = pa.array(codes, mask=codes == MISSING)
    return pa.chunked_array([pa.DictionaryArray.from_arrays(indices, names)])


def parts(values: Texts) -> Iterator[pa.ChunkedArray]:
    """The column, some thousand rows at a time."""
    column = as_column(values)
    for start in starts(len(column)):
        yield column.slice(start, CHUNK_ROWS)


def starts(rows: int) -> range:
    """Where parts of `CHUNK_ROWS` rows begin."""
    return range(0, rows, CHUNK_ROWS)
