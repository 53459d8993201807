"""What training reads: a cache of log-mel decoded once, and batches that depend on the step number alone.

A cache directory holds `shard-00000.npy` (float16[frames, mels], the clips of a shard end to end),
`shard-00000.parquet` (one row per clip, or per file that could not be decoded) and `shard-00000.json`, the receipt,
written last. Readers trust only shards with a receipt. Features are memory-mapped: all workers of a machine share one
copy in memory.
"""

import hashlib
import io
import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.storage import (
    IntegrityError,
    copy_file,
    is_local,
    read_bytes,
    read_json,
    sha256_bytes,
    to_path,
    walk_files,
    write_bytes,
    write_json,
)

CLIP_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("first_frame", pa.int64()),
        ("frames", pa.int64()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Segment:
    """One clip for the cache: `features` float[T, F] of `start_s` to `end_s` seconds of a file."""

    start_s: float
    end_s: float
    features: npt.NDArray[np.floating[Any]]


Extract = Callable[[str], Iterable[Segment]]


def cache_key(files: pa.Table, recipe: Mapping[str, Any]) -> str:
    """Name of the cache for these files and this way of making features (16 hex digits).

    Args:
        files: columns `uri`, `size`, `content_id`; the order does not matter.
        recipe: everything else that decides the bytes: feature settings, clip length.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for row in sorted(zip(*(files[name].to_pylist() for name in ("uri", "size", "content_id")), strict=True)):
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def write_shard(cache: str, index: int, uris: Sequence[str], extract: Extract) -> int:
    """Extract the files of one shard and commit them; returns the number of files that failed.

    Args:
        cache: directory or S3 prefix of the cache.
        index: shard number.
        uris: files of the shard.
        extract: uri -> its clips; an exception becomes a row with the reason and the job goes on.
    """
    rows: list[dict[str, Any]] = []
    parts: list[npt.NDArray[np.float16]] = []
    offset = 0
    for uri in uris:
        try:
            segments = [(s.start_s, s.end_s, s.features.astype(np.float16)) for s in extract(uri)]
            if not all(np.isfinite(features).all() for *_, features in segments):
                raise ValueError("the features are not finite")
        except Exception as error:
            rows.append({"uri": uri, "error": f"{type(error).__name__}: {error}"[:500]})
            continue
        for start_s, end_s, features in segments:
            frames = len(features)
            rows.append({"uri": uri, "start_s": start_s, "end_s": end_s, "first_frame": offset, "frames": frames})
            parts.append(features)
            offset += frames
    features = np.concatenate(parts) if parts else np.empty((0, 0), np.float16)
    _commit_shard(cache, index, features, pa.Table.from_pylist(rows, CLIP_SCHEMA))
    return sum(1 for row in rows if "error" in row)


def pending_shards(cache: str, shards: int) -> list[int]:
    """Shard numbers without a receipt."""
    root = to_path(cache)
    present = {item.name for item in root.iterdir()} if root.exists() else set()
    return [index for index in range(shards) if f"{_stem(index)}.json" not in present]


def read_clips(cache: str, shards: int) -> pa.Table:
    """The rows of all shards with a `shard` column added, in shard order; failed files have an `error`.

    Raises:
        IntegrityError: a shard is missing or its files do not match the receipt.
    """
    root = to_path(cache)
    tables = []
    for index in range(shards):
        stem = _stem(index)
        if not (root / f"{stem}.json").exists():
            raise IntegrityError(f"{root}: {stem} has no receipt, so it was not finished; run the same command again")
        receipt = read_json(root / f"{stem}.json")
        data = read_bytes(root / f"{stem}.parquet")
        size = (root / f"{stem}.npy").stat().st_size
        if sha256_bytes(data) != receipt["clips_sha256"] or size != receipt["features_bytes"]:
            raise IntegrityError(
                f"{root}/{stem}: the files do not match their receipt (features {size} bytes, expected "
                f"{receipt['features_bytes']}); delete the cache directory and run again"
            )
        table = pq.read_table(io.BytesIO(data))
        tables.append(table.append_column("shard", pa.array(np.full(len(table), index, np.int32))))
    return pa.concat_tables(tables)


def localise(cache: str) -> Path:
    """A local directory with the shards of `cache`: itself when local, else a copy kept for the next run."""
    root = to_path(cache)
    if is_local(root):
        return Path(str(root))
    target = Path(tempfile.gettempdir()) / "audiomae-features" / root.name
    for name, item in walk_files(root):
        if name.endswith(".npy"):
            copy = target / name
            if not copy.exists() or copy.stat().st_size != item.stat().st_size:
                copy_file(item, copy)
    return target


class FeatureStore:
    """Memory-mapped features of a set of clips.

    Args:
        cache: local cache directory.
        shard, first_frame, frames: int[N], where each clip lies.
    """

    def __init__(self, cache: Path, shard: npt.ArrayLike, first_frame: npt.ArrayLike, frames: npt.ArrayLike) -> None:
        self.shard, self.first_frame = np.asarray(shard), np.asarray(first_frame)
        self.frames = np.asarray(frames)
        self._maps = {
            int(index): np.load(cache / f"{_stem(int(index))}.npy", mmap_mode="r") for index in np.unique(self.shard)
        }

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def bands(self) -> int:
        """Mel bands per frame."""
        return int(next(iter(self._maps.values())).shape[1])

    def read(self, clip: int, start: int, length: int, out: npt.NDArray[np.float16]) -> None:
        """Copy `length` frames of a clip from frame `start` into `out` [length, F]; a short clip is repeated."""
        frames, first = int(self.frames[clip]), int(self.first_frame[clip])
        features = self._maps[int(self.shard[clip])][first : first + frames]
        if start + length <= frames:
            out[:] = features[start : start + length]
        else:
            out[:] = features[np.arange(start, start + length) % frames]


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimiser step.

    `clips` int64[B] are rows of the item table, `features` float16[V, B, R, F] the V views of each clip before
    augmentation.
    """

    step: int
    clips: npt.NDArray[np.int64]
    features: npt.NDArray[np.float16]


class Sampler:
    """Which clips a step uses: a fresh permutation of the clips per epoch, cut into global batches.

    A pure function of (seed, step): nothing to save, and every rank and every restart agrees. The rest of an epoch
    that does not fill a batch is left out; fewer clips than one batch are repeated to fill it.
    """

    def __init__(self, clips: npt.ArrayLike, batch_size: int, seed: int) -> None:
        self.clips = np.asarray(clips, np.int64)
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = max(1, len(self.clips) // batch_size)
        self._epoch, self._order = -1, self.clips

    def global_batch(self, step: int) -> npt.NDArray[np.int64]:
        """int64[batch_size] clips of one step, all ranks together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.clips)
            self._epoch, self._order = epoch, np.resize(order, max(len(order), self.batch_size))
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def local_batch(self, step: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
        """The contiguous share of `global_batch` that belongs to one rank, equally many for each."""
        share = self.batch_size // world_size
        return self.global_batch(step)[rank * share : (rank + 1) * share]


class Loader:
    """Reads batches ahead in a thread and counts how long training waited for them.

    Args:
        store: features.
        sampler: which clips.
        frames: frames to read per view (R).
        views: independent crops per clip (V).
        rank, world_size: this worker's share.
    """

    def __init__(
        self, store: FeatureStore, sampler: Sampler, frames: int, views: int, rank: int, world_size: int, depth: int = 4
    ) -> None:
        self.store, self.sampler, self.frames, self.views = store, sampler, frames, views
        self.rank, self.world_size, self.depth = rank, world_size, depth
        self.waited_s = 0.0

    def read(self, step: int) -> Batch:
        """The batch of a step; crop positions are drawn from (seed, step, rank)."""
        clips = self.sampler.local_batch(step, self.rank, self.world_size)
        features = np.empty((self.views, len(clips), self.frames, self.store.bands), np.float16)
        room = np.maximum(self.store.frames[clips] - self.frames, 0)
        draw = np.random.default_rng([self.sampler.seed, step, self.rank, 1])
        starts = draw.integers(0, room + 1, size=(self.views, len(clips)))
        for view in range(self.views):
            for row, clip in enumerate(clips):
                self.store.read(int(clip), int(starts[view, row]), self.frames, features[view, row])
        return Batch(step, clips, features)

    def batches(self, first_step: int, end_step: int) -> Generator[Batch]:
        """Batches of steps `first_step` to `end_step - 1`, read ahead."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self.depth)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(first_step, end_step):
                    if stop.is_set():
                        return
                    put(self.read(step))
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="feature-reader", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, end_step):
                began = time.perf_counter()
                item = ready.get()
                self.waited_s += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def _stem(index: int) -> str:
    return f"shard-{index:05d}"


def _commit_shard(cache: str, index: int, features: npt.NDArray[np.float16], clips: pa.Table) -> None:
    root, stem = to_path(cache), _stem(index)
    array, table = io.BytesIO(), io.BytesIO()
    np.save(array, features)
    pq.write_table(clips, table)
    write_bytes(root / f"{stem}.npy", array.getvalue())
    write_bytes(root / f"{stem}.parquet", table.getvalue())
    receipt = {
        "clips": len(clips),
        "clips_sha256": sha256_bytes(table.getvalue()),
        "features_bytes": len(array.getvalue()),
        "features_sha256": sha256_bytes(array.getvalue()),
    }
    write_json(root / f"{stem}.json", receipt)
