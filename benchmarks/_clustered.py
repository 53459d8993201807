"""Vectors that lie as embeddings of sounds do, for the benchmarks of the index: clustered, uneven, not isotropic.

`CLUSTERS` clusters around `CLASSES` class centres; cluster sizes are log-normal (sigma 1: the largest tenth holds about
40% of the rows); inside a cluster, which is as wide as its centre is far from 0, the variance of direction i is 1/i,
along axes of the cluster's own, so that about 26 of 384 dimensions matter in each. Everything follows from the seed and
the number of a block of rows, so that rows are the same however many are made. Queries are drawn as rows are, and are
no rows.

Three columns tell groups apart, each a rank among all rows, so that `{"lt": share * rows}` leaves any share:

    take    at random: independent of the sound
    label   whole clusters, those of a class together: a label or a taxonomy
    site    as `label`, blurred: each row moved by a normal step of `BLUR` of all rows, as a recording site that hears
            mostly, not only, its own sounds
"""

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from audiomae import storage
from audiomae.artifacts.embeddings import EmbeddingSet, ShardOrigin, ShardTables, commit_shard, plans, write_run
from audiomae.artifacts.releases import Release
from audiomae.artifacts.releases import resolve_or_none as release_in_force
from audiomae.artifacts.tables import EmbedSettings, embedding_schema, vectors_to_column
from audiomae.corpus.manifest import clip_id
from audiomae.search import build
from audiomae.search import index as ann
from audiomae.search.build_plan import make_plan
from audiomae.search.plan import Request
from audiomae.search.spec import BuildOptions

CLUSTERS, CLASSES = 2000, 50
BLOCK = 20_000
BLUR = 0.02
FINGERPRINT = "c" * 64


@dataclass(frozen=True)
class Clustered:
    """The generator.

    Attributes:
        dim: the length of a vector.
        seed: of everything.
    """

    dim: int = 384
    seed: int = 0

    def centres(self) -> np.ndarray:
        """float32[CLUSTERS, dim]."""
        rng = np.random.default_rng([self.seed, 0])
        classes = rng.standard_normal((CLASSES, self.dim))
        centres = np.repeat(classes, CLUSTERS // CLASSES, axis=0) + 0.8 * rng.standard_normal((CLUSTERS, self.dim))
        return _unit(centres)

    def shares(self) -> np.ndarray:
        """How large the clusters are, float64[CLUSTERS], together 1."""
        sizes = np.exp(np.random.default_rng([self.seed, 1]).standard_normal(CLUSTERS))
        return np.asarray(sizes / sizes.sum())

    def edges(self) -> np.ndarray:
        """Where each cluster begins among the sorted rows, as a share of them: float64[CLUSTERS + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.shares())])

    def block(self, number: int, count: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
        """Vectors float32[count, dim] and their clusters int64[count]."""
        rng = np.random.default_rng([self.seed, 2, number])
        clusters = rng.choice(CLUSTERS, count, p=self.shares())
        return self._around(clusters, rng), clusters

    def queries(self, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Vectors float32[count, dim] drawn as rows are, of the clusters between two shares of the sorted rows."""
        rng = np.random.default_rng([self.seed, 6, int(low * 1e6), int(high * 1e6)])
        clusters = np.searchsorted(self.edges(), rng.uniform(low, high, count), side="right") - 1
        return self._around(np.minimum(clusters, CLUSTERS - 1), rng)

    def _around(self, clusters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A vector float32[N, dim] of each of these clusters."""
        spread = (1 + np.arange(self.dim)) ** -0.5
        spread /= np.sqrt((spread**2).sum())
        steps = rng.standard_normal((len(clusters), self.dim), np.float32) * spread.astype(np.float32)
        # axes of each cluster: a random order and random signs of the coordinates of one random rotation
        rotation = np.linalg.qr(np.random.default_rng([self.seed, 3]).standard_normal((self.dim, self.dim)))[0]
        order = np.argsort(clusters, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
            own = np.random.default_rng([self.seed, 4, clusters[mine[0]]])
            signs = own.choice(np.array([-1, 1], np.float32), self.dim)
            steps[mine] = steps[mine][:, own.permutation(self.dim)] * signs
        return _unit(self.centres()[clusters] + steps @ rotation.astype(np.float32))


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def write_set(
    directory: Path, vectors: Clustered, rows: int, first_block: int = 0, total: int | None = None
) -> EmbeddingSet:
    """Write an embedding set of `rows` rows as embed_corpus.py leaves it, one shard a block.

    Args:
        directory: a new folder.
        vectors: where the vectors come from.
        rows: how many.
        first_block: the number of the first block (for a set that grows another).
        total: rows that the ranks of the columns are among; `rows` when not given.
    """
    dim = vectors.dim
    settings = EmbedSettings(
        fingerprint=FINGERPRINT,
        dim=dim,
        sample_rate=16000,
        mode="file",
        window_s=0.0,
        hop_s=0.0,
        vector_dtype="float16",
    )
    extra = [pa.field(name, pa.int32()) for name in ("take", "label", "site")] + [pa.field("class", pa.string())]
    schema = embedding_schema(settings, extra)
    blocks = [(first_block + n, min(BLOCK, rows - n * BLOCK)) for n in range(-(-rows // BLOCK))]
    names = [f"000000-{number:06d}" for number, _ in blocks]
    write_run(str(directory), {"fingerprint": FINGERPRINT, "dim": dim, "encoder": "none", "corpus_root": "/clustered"})
    plan = {"generation": 0, "settings": settings.model_dump(), "shards": [{"name": n} for n in names], "files": []}
    plans(str(directory)).create(0, plan)
    write = partial(_write_block, directory, vectors, schema, total or rows)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, blocks, names))
    return EmbeddingSet.open(str(directory))


def _write_block(
    directory: Path, vectors: Clustered, schema: pa.Schema, total: int, block: tuple[int, int], name: str
) -> None:
    """Write one shard: block `block[0]` of `block[1]` rows."""
    number, count = block
    edges, shares = vectors.edges(), vectors.shares()
    found, clusters = vectors.block(number, count)
    rng = np.random.default_rng([vectors.seed, 5, number])
    place = edges[clusters] + shares[clusters] * rng.random(count)
    blurred = np.abs(place + BLUR * rng.standard_normal(count))
    site = 1 - np.abs(1 - blurred)  # reflected at both ends
    uris = [f"{number:06d}/{row:06d}.wav" for row in range(count)]
    columns = [
        pa.array([clip_id(uri, 0.0, 0.0) for uri in uris], pa.int64()),
        pa.array(uris),
        pa.array(np.zeros(count)),
        pa.array(np.full(count, 5.0)),
        vectors_to_column(found.astype(np.float16)),
        *(pa.array((share * total).astype(np.int32)) for share in (rng.random(count), place, site)),
        pa.array([f"class-{cluster // (CLUSTERS // CLASSES):02d}" for cluster in clusters]),
    ]
    tables = ShardTables(pa.table(columns, schema=schema))
    origin = ShardOrigin(inputs=count, audio_s=0.0, fingerprint=FINGERPRINT, manifest="m", precision="float32")
    commit_shard(str(directory), name, tables, origin)


def build_release(
    index_dir: Path, sets: list[EmbeddingSet], config: BuildOptions, request: Request | None = None
) -> Release | None:
    """What `build_index.py` does, in this process and without an encoder; None when there is nothing to do."""
    base = release_in_force(index_dir)
    work = make_plan(sets, base, request or Request(), config)
    if work is None:
        return None
    dim = int(base.info["dim"]) if base else sets[0].dim

    def save_encoder(target: Path) -> None:
        storage.write_json(target / "config.json", {"fingerprint": FINGERPRINT})

    facts = {"fingerprint": FINGERPRINT, "dim": dim}
    return build.run_build(work, str(index_dir), config, build.run_here, save_encoder, facts)


def row_store(index_dir: Path) -> ann.RowStore:
    """The vectors of a release that is one segment."""
    release = release_in_force(index_dir)
    assert release is not None
    (segment,) = release.info["segments"]
    return ann.RowStore(index_dir / segment["name"] / ann.VECTORS_FILE)


class Spent:
    """What a block took, as a context manager: `facts` has seconds, CPU seconds and the peak of anonymous memory."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}
        self._peak, self._done = 0, threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(0.1):
            self._peak = max(self._peak, memory_bytes("RssAnon"))

    def __enter__(self) -> "Spent":
        self._watch.start()
        self._began, self._worked = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.facts = {"wall_s": time.perf_counter() - self._began, "cpu_s": time.process_time() - self._worked}
        self._done.set()
        self._watch.join()
        self.facts["peak_mib"] = max(self._peak, memory_bytes("RssAnon")) / 2**20


def memory_bytes(name: str) -> int:
    """A figure of this process from /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))
