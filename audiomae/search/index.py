"""The vector index: choose, train, build a part, merge, search. The only module that imports faiss.

A release holds every vector once as float16, in row order (`vectors.faiss`, memory-mapped): the *row store*. It answers
exact searches, gives any vector back, and is what every index is built from, so an index built in parts, in one piece
or again from an older release has the same bytes. Small releases search the row store itself; larger ones put an
inverted-file index (`index.faiss`, in memory) before it and rescore its candidates on the row store, so scores are the
cosine similarity of the stored vectors whatever the index is.

FAISS ids are row numbers; clip ids lie beside them in `ids.npy`. Deleted rows stay until a rebuild and are masked out.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from audiomae.errors import IntegrityError
from audiomae.search.spec import IndexSpec
from audiomae.search.spec import choose as choose

VECTORS_FILE, INDEX_FILE, TRAINED_FILE = "vectors.faiss", "index.faiss", "trained.faiss"
IDS_FILE, DELETED_FILE, BLOCKED_FILE = "ids.npy", "deleted.npy", "blocked_ids.npy"
EXACT_MAX_MATCHES = 20_000  # a filter that leaves no more rows than this is answered by an exact scan
MAX_PROBE_FACTOR = 4.0  # how much wider to probe when a filter leaves a tenth of the rows or more
TRAIN_ROWS_PER_LIST = 64
ADD_BATCH = 16_384
_READ_LOCK = threading.Lock()


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


def train(spec: IndexSpec, sample: np.ndarray, out: Path, seed: int = 0) -> None:
    """Train an empty index on row-store vectors `float16[N, D]` and write it to `out`."""
    index = faiss.index_factory(sample.shape[1], spec.factory, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed + 1234
    index.cp.max_points_per_centroid = TRAIN_ROWS_PER_LIST
    index.train(sample.astype(np.float32))
    faiss.write_index(index, str(out))


def build_part(trained: Path, rows: np.ndarray, out: Path) -> None:
    """Add row-store vectors `float16[N, D]` to a copy of the trained index; row numbers start at 0 in every part."""
    index = read_index(trained)
    for start in range(0, len(rows), ADD_BATCH):
        index.add(rows[start : start + ADD_BATCH].astype(np.float32))
    faiss.write_index(index, str(out))


def merge(parts: Sequence[Path], out: Path) -> int:
    """Join parts of one trained index, in order, into the index that one piece would have given; return its rows.

    Raises:
        IntegrityError: parts that were trained apart.
    """
    merged = read_index(parts[0])
    for part in parts[1:]:
        other = read_index(part)
        try:
            merged.check_compatible_for_merge(other)
        except RuntimeError as error:
            raise IntegrityError(f"{part}: not built from the trained index of {parts[0]}: {error}") from None
        merged.merge_from(other, merged.ntotal)
    faiss.write_index(merged, str(out))
    return int(merged.ntotal)


def write_row_store(blocks: Iterator[np.ndarray], dim: int, out: Path) -> int:
    """Write row-store vectors, given as float16[n, D] blocks, as one file that can be mapped; return how many."""
    store = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for block in blocks:
        store.add_sa_codes(np.ascontiguousarray(block).view(np.uint8))
    faiss.write_index(store, str(out))
    return int(store.ntotal)


def read_rows(directory: Path, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of a release's row store, float16[n, D], in memory."""
    store = read_index(directory / VECTORS_FILE, mapped=True)
    return _codes(store)[start:stop].copy()


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


def _codes(store: Any) -> np.ndarray:
    """The row store's vectors, float16[N, D], without a copy: valid as long as `store` lives."""
    codes: np.ndarray = faiss.rev_swig_ptr(store.codes.data(), store.codes.size())
    return codes.view(np.float16).reshape(store.ntotal, store.d)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let FAISS use `count` threads inside the block (Ray allots one to a one-CPU task)."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@dataclass(frozen=True)
class Selection:
    """The rows that a search may return: `bits` is bool[N] packed little-endian, `count` how many are set."""

    bits: np.ndarray
    count: int

    @classmethod
    def of(cls, mask: np.ndarray) -> "Selection":
        """From bool[N]."""
        return cls(np.packbits(mask, bitorder="little"), int(np.count_nonzero(mask)))

    def mask(self, count: int) -> np.ndarray:
        """The selection as bool[count]."""
        return np.unpackbits(self.bits, count=count, bitorder="little").view(bool)


class Searcher:
    """Row store plus index: row numbers for vectors. Safe to call from several threads.

    Args:
        directory: where `vectors.faiss` and `index.faiss` lie, checked already.
        spec: what they are.
    """

    def __init__(self, directory: Path, spec: IndexSpec) -> None:
        self.spec = spec
        self._store = read_index(directory / VECTORS_FILE, mapped=True)
        self._index: Any = read_index(directory / INDEX_FILE) if spec.kind == "ivf" else None
        self.num_rows, self.dim = int(self._store.ntotal), int(self._store.d)
        if self._index is not None and (self._index.ntotal, self._index.d) != (self.num_rows, self.dim):
            raise IntegrityError(
                f"{directory}: index of {self._index.ntotal} x {self._index.d} beside a row store of "
                f"{self.num_rows} x {self.dim}: build the index again"
            )
        self.rows = _codes(self._store)

    def search(
        self, queries: np.ndarray, k: int, selection: Selection | None = None, spec: IndexSpec | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query by inner product, best first.

        Args:
            queries: float32[Q, D], unit length.
            k: how many.
            selection: only these rows; None for all.
            spec: search settings other than the index's own (for tuning).

        Returns:
            scores float32[Q, k] and rows int64[Q, k]; where there are fewer, row -1 with score -inf.
        """
        spec = spec or self.spec
        count = self.num_rows if selection is None else selection.count
        shape = (len(queries), k)
        if count == 0 or not len(queries):
            return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        selector = None if selection is None else faiss.IDSelectorBitmap(selection.bits)
        if self._index is None or (selection is not None and count <= EXACT_MAX_MATCHES):
            scores, rows = self._store.search(queries, k, params=faiss.SearchParameters(sel=selector))
            return np.where(rows < 0, -np.inf, scores).astype(np.float32), rows
        share = count / self.num_rows
        factor = 1 / share if share < 0.1 else min(1 / share, MAX_PROBE_FACTOR)
        nprobe = min(spec.nlist, math.ceil(spec.nprobe * factor))
        scores, rows = self._probe(queries, k, selector, nprobe, spec.refine)
        short = np.flatnonzero((rows < 0).sum(axis=1) > max(0, k - count))
        if len(short) and nprobe < spec.nlist:  # the lists probed held too few matches: look everywhere
            scores[short], rows[short] = self._probe(queries[short], k, selector, spec.nlist, spec.refine)
        return scores, rows

    def _probe(
        self, queries: np.ndarray, k: int, selector: Any, nprobe: int, refine: int
    ) -> tuple[np.ndarray, np.ndarray]:
        params = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
        _, found = self._index.search(queries, min(k * refine, self.num_rows), params=params)
        scores = np.einsum("qd,qnd->qn", queries, self.rows[found].astype(np.float32))
        scores[found < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1)
        missing = k - rows.shape[1]
        if missing > 0:
            scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
            rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        return scores, rows
