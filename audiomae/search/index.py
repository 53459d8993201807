"""The vector index itself: training, encoding, mapped inverted lists, scanning. The only module that imports faiss.

A segment holds every vector once as float16, in row order (`vectors.faiss`, memory-mapped): the *row store*. It
answers exact searches, gives any vector back, rescores what an approximate index proposes, and is what every index is
built from, so an index built in parts, in one piece or again has the same bytes.

Before it stands, in larger releases, an inverted file: one quantiser for all segments of a release (`trained.faiss`,
its centroids as float16), and for each segment the list of every row (`assign.npy`) and the codes of every list
(`lists.bin`, with the places of the lists in `layout.npy`). `lists.bin` is mapped as well, whatever the codes are
(also those that FAISS itself cannot map), so that any number of processes of one machine share one copy.

FAISS ids are row numbers within a segment; clip ids lie beside them.
"""

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from audiomae.errors import IntegrityError
from audiomae.search.spec import IndexSpec
from audiomae.vectors import widened

VECTORS_FILE, INDEX_FILE, TRAINED_FILE = "vectors.faiss", "index.faiss", "trained.faiss"
ASSIGN_FILE, LISTS_FILE, LAYOUT_FILE, SHAPE_FILE = "assign.npy", "lists.bin", "layout.npy", "shape.npy"
TRAIN_ROWS_PER_LIST = 40
TRAIN_ROUNDS = 10
POWER_ROUNDS = 8  # towards a principal direction
ADD_BATCH = 16_384
FEW_ROWS = 1_024  # gathered into memory that is kept for the next
ALIGN = 64
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


# --- the row store ----------------------------------------------------------------------------------------------------


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


# --- training and encoding --------------------------------------------------------------------------------------------


def train(spec: IndexSpec, sample: np.ndarray, out: Path, seed: int = 0) -> None:
    """Train an empty inverted file on row-store vectors `float16[N, D]`; write it and what lists look like into `out`.

    k-means is spherical, on a GPU where faiss has one. `shape.npy` is float32[2, nlist]: the mean and the variance of
    the similarity between a list's centroid and its rows, which tells how promising a list is that was not looked at.
    """
    vectors = widened(sample)
    dim = vectors.shape[1]
    kmeans = faiss.Kmeans(
        dim,
        spec.nlist,
        niter=TRAIN_ROUNDS,
        spherical=True,
        seed=seed + 1234,
        gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=TRAIN_ROWS_PER_LIST,
    )
    kmeans.train(vectors)
    quantizer = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    centroids = kmeans.centroids[neighbours_together(kmeans.centroids)]
    quantizer.add_sa_codes(np.ascontiguousarray(centroids, dtype=np.float16).view(np.uint8))
    index = faiss.index_factory(dim, spec.factory, faiss.METRIC_INNER_PRODUCT)
    index.quantizer, index.own_fields = quantizer, False
    index.train(vectors)
    faiss.write_index(index, str(out / TRAINED_FILE))
    similar, lists = _to_gpus(_flat_centroids(quantizer)).search(vectors, 1)
    np.save(out / SHAPE_FILE, _list_shape(similar[:, 0], lists[:, 0], spec.nlist))


def neighbours_together(points: np.ndarray) -> np.ndarray:
    """An order int64[N] of points float32[N, D] in which near ones come near each other.

    A shard holds a range of lists: in this order the lists that a query looks at lie with few shards. The points are
    halved along the direction in which they spread most, and the halves again.
    """
    if len(points) <= 2:
        return np.arange(len(points))
    centred = points - points.mean(axis=0)
    direction = centred[np.argmax((centred**2).sum(axis=1))]
    for _ in range(POWER_ROUNDS):
        direction = centred.T @ (centred @ direction)
        direction /= max(float(np.linalg.norm(direction)), 1e-12)
    order = np.argsort(centred @ direction, kind="stable")
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    return np.concatenate([half[neighbours_together(points[half])] for half in halves])


def _list_shape(similar: np.ndarray, lists: np.ndarray, nlist: int) -> np.ndarray:
    """Mean and variance by list, drawn towards those of all lists where a list has few rows."""
    count = np.bincount(lists, minlength=nlist)
    overall, weight = similar.mean(), 5
    mean = (np.bincount(lists, similar, nlist) + weight * overall) / (count + weight)
    spread = (similar - mean[lists]) ** 2
    variance = (np.bincount(lists, spread, nlist) + weight * spread.mean()) / (count + weight)
    return np.stack([mean, variance]).astype(np.float32)


def _flat_centroids(quantizer: Any) -> Any:
    """The centroids as an uncompressed index, which assigns large batches several times faster."""
    flat = faiss.IndexFlatIP(quantizer.d)
    flat.add(quantizer.reconstruct_n(0, quantizer.ntotal))
    return flat


def _to_gpus(flat: Any) -> Any:
    """For whole corpora of rows: on the GPUs, where faiss has some."""
    return faiss.index_cpu_to_all_gpus(flat) if faiss.get_num_gpus() > 0 else flat


def assign(trained: Path, rows: np.ndarray) -> np.ndarray:
    """The list of each row-store vector: uint16 or uint32 [N]."""
    index = read_index(trained)
    centroids = _to_gpus(_flat_centroids(faiss.downcast_index(index.quantizer)))
    lists = np.empty(len(rows), np.uint16 if index.nlist <= 2**16 else np.uint32)
    for start in range(0, len(rows), ADD_BATCH):
        block = widened(rows[start : start + ADD_BATCH])
        lists[start : start + len(block)] = centroids.search(block, 1)[1][:, 0]
    return lists


def encode(trained: Path, rows: np.ndarray, lists: np.ndarray, out: Path) -> None:
    """Write `lists.bin` and `layout.npy` for the rows of a segment whose lists are known.

    List by list, so memory does not grow with the rows.

    Args:
        trained: the trained file.
        rows: float16[N, D], mapped or not.
        lists: int[N], from `assign`.
        out: the directory.
    """
    index = read_index(trained)
    one, centroid, _lists = _one_list(read_index(trained))
    order = np.argsort(lists, kind="stable")
    edges = np.searchsorted(lists, np.arange(index.nlist + 1), sorter=order)
    layout = np.zeros((index.nlist, 3), np.uint64)  # rows, bytes of codes, offset
    with (out / LISTS_FILE).open("wb") as file:
        for number in range(index.nlist):
            chosen = order[edges[number] : edges[number + 1]]
            centroid.reset()
            centroid.add(index.quantizer.reconstruct_n(number, 1))
            one.reset()
            for start in range(0, len(chosen), ADD_BATCH):
                batch = chosen[start : start + ADD_BATCH]
                one.add_with_ids(widened(rows[batch]), batch)
            layout[number] = _write_list(file, one)
    np.save(out / LAYOUT_FILE, layout)


def _one_list(one: Any) -> tuple[Any, Any, Any]:
    """The trained index with a single list, so that what is added can go to no other.

    Its centroid and its lists come with it: FAISS keeps bare pointers to them.
    """
    inverted = faiss.downcast_InvertedLists(one.invlists)
    centroid = faiss.IndexFlatIP(one.d)
    one.quantizer, one.own_fields = centroid, False
    one.nlist = 1
    if isinstance(inverted, faiss.BlockInvertedLists):
        lists = faiss.BlockInvertedLists(1, one.get_CodePacker())
        lists.block_size = inverted.block_size
    else:
        lists = faiss.ArrayInvertedLists(1, one.code_size)
    one.invlists, one.own_invlists = lists, False
    return one, centroid, lists


def _write_list(file: Any, one: Any) -> tuple[int, int, int]:
    inverted = faiss.downcast_InvertedLists(one.invlists)
    count, offset = int(inverted.list_size(0)), file.tell()
    if count == 0:
        return 0, 0, offset
    if isinstance(inverted, faiss.BlockInvertedLists):
        size = -(-count // inverted.n_per_block) * inverted.block_size
    else:
        size = count * int(one.code_size)
    file.write(faiss.rev_swig_ptr(inverted.get_codes(0), size).data)
    file.write(b"\0" * (-file.tell() % 8))
    capacity = file.tell() - offset
    file.write(faiss.rev_swig_ptr(inverted.get_ids(0), count).data)
    file.write(b"\0" * (-file.tell() % ALIGN))
    return count, capacity, offset


# --- searching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The rows of a segment that may be returned: `bits` is bool[N] packed little-endian, `count` how many are set."""

    bits: np.ndarray
    count: int

    @classmethod
    def of(cls, mask: np.ndarray) -> "Selection":
        """From bool[N]."""
        return cls(np.packbits(mask, bitorder="little"), int(np.count_nonzero(mask)))

    def mask(self, count: int) -> np.ndarray:
        """The selection as bool[count]."""
        return np.unpackbits(self.bits, count=count, bitorder="little").view(bool)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows' numbers in ascending order, int64[n]."""
        return np.flatnonzero(np.unpackbits(self.bits, bitorder="little"))

    @functools.cached_property
    def digest(self) -> str:
        """Of the bits: equal for equal selections."""
        return hashlib.blake2b(self.bits.data, digest_size=16).hexdigest()


class Quantiser:
    """The centroids that all segments of a release share.

    Args:
        directory: where `trained.faiss` and `shape.npy` lie, checked already.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / TRAINED_FILE
        shape = directory / SHAPE_FILE
        self._open(np.load(shape) if shape.exists() else None)

    def _open(self, shape: np.ndarray | None) -> None:
        self.index = read_index(self.path)
        self.nlist, self.shape = int(self.index.nlist), shape
        self.flat = _flat_centroids(faiss.downcast_index(self.index.quantizer))

    @functools.cached_property
    def centroids(self) -> np.ndarray:
        """float32[nlist, D], those that `flat` holds."""
        values: np.ndarray = faiss.rev_swig_ptr(self.flat.get_xb(), self.nlist * self.flat.d)
        return values.reshape(self.nlist, -1)

    def similarities(self, queries: np.ndarray) -> np.ndarray:
        """Of queries to the centroids of all lists, float32[Q, nlist]."""
        similar: np.ndarray = queries @ self.centroids.T
        return similar

    def nearest(self, queries: np.ndarray, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities float32[Q, nprobe] and numbers int64[Q, nprobe] of the nearest lists, best first."""
        found: tuple[np.ndarray, np.ndarray] = self.flat.search(queries, min(nprobe, self.nlist))
        return found


def shares_of_lists(sizes: np.ndarray, shares: int) -> np.ndarray:
    """To which of so many shares of a segment, about as large each, every list belongs: int64[nlist]."""
    before = np.cumsum(sizes) - sizes
    found: np.ndarray = before * shares // max(int(sizes.sum()), 1)
    return found


class Lists:
    """The codes of one segment in inverted lists, mapped.

    Args:
        quantiser: the release's.
        directory: the segment, its files checked.
        part: only this share of the lists (a number, of how many shares of about as many rows); the others are empty.
    """

    def __init__(self, quantiser: Quantiser, directory: Path, part: tuple[int, int] = (0, 1)) -> None:
        layout = np.ascontiguousarray(np.load(directory / LAYOUT_FILE), np.uint64)
        path = directory / LISTS_FILE
        self._check(layout, quantiser.nlist, path)
        self.sizes = layout[:, 0].astype(np.int64)
        layout[shares_of_lists(self.sizes, part[1]) != part[0]] = 0
        self._inverted = faiss.OnDiskInvertedLists()
        self._inverted.nlist, self._inverted.code_size = quantiser.nlist, 1  # so that a list's `capacity` is in bytes
        self._inverted.filename, self._inverted.totsize = str(path), os.path.getsize(path)
        self._inverted.read_only, self._inverted.prefetch_nthread = True, 0
        self._inverted.lists.resize(quantiser.nlist)
        ctypes.memmove(int(self._inverted.lists.data().this), layout.ctypes.data, layout.nbytes)
        if os.path.getsize(path):
            self._inverted.do_mmap()
        index = read_index(quantiser.path)
        index.own_invlists = False  # the empty ones are left to themselves
        index.invlists = self._inverted
        index.ntotal = int(layout[:, 0].sum())
        self._use(index, quantiser)

    def _use(self, index: Any, quantiser: Quantiser) -> None:
        self._index, self._quantiser = index, quantiser  # FAISS keeps bare pointers
        if index.own_fields:
            index.quantizer.this.own(True)  # freed with this line: it holds the same centroids once more, as float16
            index.own_fields = False
        index.quantizer = quantiser.flat

    @staticmethod
    def _check(layout: np.ndarray, nlist: int, path: Path) -> None:
        counts, sizes, offsets = (layout[:, i].astype(np.int64) for i in range(3))
        ends = offsets + sizes + 8 * counts
        if layout.shape != (nlist, 3) or (layout >= 2**62).any() or ends.max(initial=0) > os.path.getsize(path):
            raise IntegrityError(f"{path}: the lists do not lie where {LAYOUT_FILE} says; build the index again")

    def scan(
        self, queries: np.ndarray, k: int, lists: np.ndarray, similar: np.ndarray, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows by their codes in some lists.

        Args:
            queries: float32[Q, D].
            k: how many.
            lists: int64[Q, n], -1 for none.
            similar: float32[Q, n], what `Quantiser.nearest` gave for them.
            selection: only these rows.

        Returns:
            approximate scores float32[Q, k] and rows int64[Q, k], -1 padded.
        """
        selector = None if selection is None else faiss.IDSelectorBitmap(selection.bits)
        params = faiss.SearchParametersIVF(sel=selector, nprobe=lists.shape[1])
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        lists, similar = np.ascontiguousarray(lists, np.int64), np.ascontiguousarray(similar, np.float32)
        pointers = [faiss.swig_ptr(array) for array in (lists, similar, scores, rows)]
        self._index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), int(k), *pointers, False, params)
        return scores, rows


class Refined:
    """All lists of a segment with its row store behind them, searched by one call of FAISS.

    What `Quantiser.nearest`, `Lists.scan` and a comparison with the stored vectors give; those are read where they lie.

    Args:
        lists: all of them.
        store: of the same segment.
    """

    def __init__(self, lists: Lists, store: RowStore) -> None:
        self._lists, self._store = lists, store  # FAISS keeps bare pointers
        self._index = faiss.IndexRefine(lists._index, store._store)

    def search(
        self, queries: np.ndarray, k: int, nprobe: int, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows by their codes in the nearest lists: exact scores float32[Q, k] and rows int64[Q, k]."""
        params = _unfiltered(nprobe) if selection is None else _refining(nprobe, faiss.IDSelectorBitmap(selection.bits))
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (scores, rows)]
        self._index.search_c(len(queries), faiss.swig_ptr(queries), int(k), *pointers, params)
        return scores, rows


def _refining(nprobe: int, selector: Any = None) -> Any:
    inner = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
    return faiss.IndexRefineSearchParameters(k_factor=1.0, base_index_params=inner)


_unfiltered = functools.lru_cache(maxsize=64)(
    _refining
)  # they are only read, and making them takes a tenth of a search


class OldQuantiser(Quantiser):
    """The quantiser of a release that an older version wrote, inside its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open(None)


class OldLists(Lists):
    """The index of a release that an older version wrote, in memory."""

    def __init__(self, quantiser: OldQuantiser) -> None:
        self._use(quantiser.index, quantiser)
        inverted = self._index.invlists
        self.sizes = np.array([inverted.list_size(number) for number in range(quantiser.nlist)], np.int64)


class Graph:
    """One segment's HNSW graph, in memory.

    Args:
        path: `index.faiss`, checked.
    """

    def __init__(self, path: Path) -> None:
        self._index = read_index(path)

    def search(
        self, queries: np.ndarray, k: int, effort: int, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows: approximate scores float32[Q, k] and rows int64[Q, k]."""
        selector = None if selection is None else faiss.IDSelectorBitmap(selection.bits)
        params = faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort, k))
        found: tuple[np.ndarray, np.ndarray] = self._index.search(queries, k, params=params)
        return found


def build_graph(factory: str, rows: np.ndarray, out: Path) -> None:
    """Build the graph of one segment from row-store vectors float16[N, D]."""
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    sample = rows[:: max(1, len(rows) // 65_536)]
    index.train(widened(sample))
    for start in range(0, len(rows), ADD_BATCH):
        index.add(widened(rows[start : start + ADD_BATCH]))
    faiss.write_index(index, str(out))
