"""The index that autofaiss 2.18 builds, from its own rules.

autofaiss itself cannot be installed beside this package (it needs numpy < 2), so its choices are followed here, with
the same FAISS calls in the same order: `get_optimal_index_keys_v2` and `get_optimal_nb_clusters` (external/optimize.py)
for the kind of index within a memory, `index_factory` (indices/index_factory.py) to make it, `get_optimal_train_size`
for how much to train on, its own range of search settings. Two things favour it: the training points are the fewest
that it ever uses (31 a list; 100 where there is memory), and its search settings are those with the best speed at the
recall asked for rather than the ones that it would take.
"""

import math
import re
from collections.abc import Iterator

import faiss
import numpy as np

TRAIN_POINTS = 31  # a list, its least
LINKS = 32
ADD_ROWS = 65_536
PQ_SIZES = (256, 128, 64, 48, 32, 24, 16, 8, 4)


def choose_key(rows: int, dim: int, memory_bytes: float) -> str:
    """The factory string that autofaiss takes for so many vectors within a memory, not to be mapped."""
    links = math.floor((memory_bytes / (4 * rows) - dim) / 2)
    if links >= 8:
        return f"HNSW{min(links, 32)}"
    lists = lists_for(rows)
    if rows < 1_000_000 and rows * (4 * dim + 8) <= memory_bytes:
        return f"IVF{lists},Flat"
    for size in PQ_SIZES:
        if size < dim and rows * (size + 8) <= memory_bytes:
            rotated = (min(dim // size, 6) + 1) * size
            coarse = f"IVF{lists}" if lists < 1000 else f"IVF{lists}_HNSW{LINKS}"
            return f"OPQ{size}_{rotated},{coarse},PQ{size}x8"
    raise ValueError(f"autofaiss has no index for {rows:,} vectors in {memory_bytes / 2**20:.0f} MiB")


def lists_for(rows: int) -> int:
    """Its first choice of the number of lists."""
    if rows < 1_000_000:
        return int(2 ** round(math.log2(4 * math.sqrt(rows))))
    return 16_384 if rows < 10_000_000 else 65_536 if rows < 300_000_000 else 2**17


def build(key: str, rows: np.ndarray, path: str, seed: int = 0) -> None:
    """Train the index on some rows float16[N, D], add all of them, write it."""
    dim = rows.shape[1]
    index = make(key, dim)
    if "IVF" in key:
        found = re.search(r"IVF(\d+)", key)
        assert found is not None
        count = min(len(rows), TRAIN_POINTS * int(found[1]))
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
        index.train(rows[chosen].astype(np.float32))
    for start in range(0, len(rows), ADD_ROWS):
        index.add(rows[start : start + ADD_ROWS].astype(np.float32))
    faiss.write_index(index, path)


def make(key: str, dim: int) -> faiss.Index:
    """An empty index, put together as autofaiss does for inner products."""
    found = re.fullmatch(r"OPQ(\d+)_(\d+),IVF(\d+)(_HNSW\d+)?,PQ(\d+)x8", key)
    if not found:
        return faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    size, rotated, lists = int(found[1]), int(found[2]), int(found[3])
    if found[4]:
        quantizer = faiss.IndexHNSWFlat(rotated, LINKS, faiss.METRIC_INNER_PRODUCT)
    else:
        quantizer = faiss.IndexFlatIP(rotated)
    inverted = faiss.IndexIVFPQ(quantizer, rotated, lists, size, 8, faiss.METRIC_INNER_PRODUCT)
    inverted.own_fields = True
    quantizer.this.disown()
    inverted.cp.min_points_per_centroid = 1
    if found[4]:
        inverted.quantizer_trains_alone = 2
    rotation = faiss.OPQMatrix(dim, size, rotated)
    index = faiss.IndexPreTransform(rotation, inverted)
    index.own_fields = True
    for part in (rotation, inverted):
        part.this.disown()
    return index


def settings(key: str) -> Iterator[str]:
    """What it may search with, from cheap to expensive, as FAISS's own parameter strings."""
    if key.startswith("HNSW"):
        for effort in (16, 32, 64, 128, 256, 512, 1024):
            yield f"efSearch={effort}"
        return
    for nprobe in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 6144):
        codes = ",ht=2048" if "PQ" in key else ""
        yield f"nprobe={nprobe},efSearch={2 * nprobe}{codes}" if "HNSW" in key else f"nprobe={nprobe}{codes}"
