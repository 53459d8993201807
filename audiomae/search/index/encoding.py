"""The inverted file of a segment: its quantiser trained, rows given their lists, lists written as codes."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from audiomae.search.index.store import read_index
from audiomae.search.spec import IndexSpec
from audiomae.vectors import widened

TRAINED_FILE, SHAPE_FILE = "trained.faiss", "shape.npy"
ASSIGN_FILE, LISTS_FILE, LAYOUT_FILE = "assign.npy", "lists.bin", "layout.npy"
TRAIN_ROWS_PER_LIST = 40
TRAIN_ROUNDS = 10
POWER_ROUNDS = 8  # towards a principal direction
ADD_BATCH = 16_384
ALIGN = 64


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
    similar, lists = _on_gpus(flat_centroids(quantizer)).search(vectors, 1)
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


def flat_centroids(quantizer: Any) -> Any:
    """The centroids as an uncompressed index, which assigns large batches several times faster."""
    flat = faiss.IndexFlatIP(quantizer.d)
    flat.add(quantizer.reconstruct_n(0, quantizer.ntotal))
    return flat


def _on_gpus(flat: Any) -> Any:
    """For whole corpora of rows: on the GPUs, where faiss has some."""
    return faiss.index_cpu_to_all_gpus(flat) if faiss.get_num_gpus() > 0 else flat


def assign(trained: Path, rows: np.ndarray) -> np.ndarray:
    """The list of each row-store vector: uint16 or uint32 [N]."""
    index = read_index(trained)
    centroids = _on_gpus(flat_centroids(faiss.downcast_index(index.quantizer)))
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
