"""The row store: every vector of a segment once, as float16, mapped; and what all of `index` shares."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from audiomae.errors import IntegrityError

VECTORS_FILE = "vectors.faiss"
WORTH_A_TEAM = 500_000  # multiplications of a search: to wake other threads takes as long as these
FEW_ROWS = 1_024  # gathered into memory that is kept for the next
_READ_LOCK = threading.Lock()
Ranked = tuple[np.ndarray, np.ndarray]  # scores float32[Q, k] and rows int64[Q, k]


def to_rows(vectors: np.ndarray, source: str = "embeddings") -> np.ndarray:
    """Vectors as the row store keeps them: L2-normalised float16[N, D]. `source` names them in errors.

    Raises:
        IntegrityError: a vector with NaN, infinity or no length, with its row.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-6))
    if len(bad):
        raise IntegrityError(
            f"{source}: the vector in row {bad[0]} has length {norms[bad[0], 0]}, expected a finite unit vector "
            f"({len(bad)} of {len(vectors)} rows): embed the corpus again"
        )
    return (vectors / norms).astype(np.float16)


def can_use_gpus() -> bool:
    """Whether this FAISS was built for GPUs; another machine of a cluster may have some where this one has none."""
    return hasattr(faiss, "StandardGpuResources")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let FAISS use `count` threads inside the block (Ray allots one to a one-CPU task)."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def read_index(path: Path, mapped: bool = False) -> Any:
    """Read a FAISS file whose checksum was verified; what it may allocate is bounded by its size."""
    limit = 10 * os.path.getsize(path) + (1 << 20)
    with _READ_LOCK:  # the limit is global to the process
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(limit)
        try:
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise IntegrityError(f"{path}: not a readable index: {error}; build the index again") from None
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


def write_row_store(blocks: Iterator[np.ndarray], dim: int, count: int, out: Path) -> None:
    """Write `count` row-store vectors, given as float16[n, D] blocks, as one file that can be mapped.

    The file is what FAISS would write, in memory that does not grow with `count`: the head of an empty store with its
    two counts filled in, then the vectors as they are.
    """
    store = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    head = bytearray(faiss.serialize_index(store).tobytes())
    head[8:16] = np.int64(count).tobytes()
    head[-8:] = np.uint64(count * dim * 2).tobytes()
    written = 0
    with out.open("wb") as file:
        file.write(head)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=np.float16).data)
            written += len(block)
    if written != count:
        raise IntegrityError(f"{out}: {written} vectors written, expected {count}")


class RowStore:
    """The vectors of one segment, mapped. `rows` is float16[N, D] without a copy."""

    def __init__(self, path: Path) -> None:
        self._store = read_index(path, mapped=True)
        self.num_rows, self.dim = int(self._store.ntotal), int(self._store.d)
        shape = (self.num_rows, self.dim)
        if self.num_rows:  # a mapping of its own, which may outlive this object
            offset = os.path.getsize(path) - self.num_rows * self.dim * 2
            self.rows = np.asarray(np.memmap(path, np.float16, "r", offset, shape))
        else:
            self.rows = np.zeros(shape, np.float16)
        self._codes = self.rows.view(np.uint8)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as float32[n, D]."""
        vectors: np.ndarray = self._store.sa_decode(self._codes[rows])
        return vectors

    def search(self, queries: np.ndarray, k: int, between: tuple[int, int] | None = None) -> Ranked:
        """The k best of all rows, or of those `between`, exactly: float32[Q, k] and int64[Q, k], -1 padded."""
        params = None if between is None else faiss.SearchParameters(sel=faiss.IDSelectorRange(*between))
        with threads(1) if len(queries) * self.num_rows * self.dim < WORTH_A_TEAM else nullcontext():
            found: Ranked = self._store.search(queries, k, params=params)
        return found

    def search_rows(self, queries: np.ndarray, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k best of these rows, exactly. Their vectors are gathered, so the cost is that of the rows alone."""
        scores, places = self._gathered(rows).search(queries, k)
        return scores, np.where(places < 0, -1, rows[places])

    def scores(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of these rows for one query float32[1, D], exactly: float32[n]. A score does not depend on the other rows."""
        found, places = self._gathered(rows).search(query, len(rows))
        scores = np.empty(len(rows), np.float32)
        scores[places[0]] = found[0]
        return scores

    def _gathered(self, rows: np.ndarray) -> Any:
        """An index of these rows alone, good until this thread asks for the next."""
        index, codes = _few(self.dim) if len(rows) <= FEW_ROWS else _empty(self.dim, len(rows))
        np.take(self._codes, rows, axis=0, out=codes[: len(rows)], mode="clip")
        index.ntotal = len(rows)
        return index


class _Kept(threading.local):
    """What `_few` gives, by the length of a vector."""

    def __init__(self) -> None:
        self.by_dim: dict[int, tuple[Any, np.ndarray]] = {}


_kept = _Kept()


def _few(dim: int) -> tuple[Any, np.ndarray]:
    """This thread's index of up to `FEW_ROWS` rows: making one takes as long as comparing dozens of rows."""
    if dim not in _kept.by_dim:
        _kept.by_dim[dim] = _empty(dim, FEW_ROWS)
    return _kept.by_dim[dim]


def _empty(dim: int, rows: int) -> tuple[Any, np.ndarray]:
    """An index with room for so many rows, and the room, uint8[rows, 2 D]."""
    index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.codes.resize(rows * 2 * dim)
    return index, faiss.rev_swig_ptr(index.codes.data(), index.codes.size()).reshape(rows, -1)
