"""The features of a remote cache that a node needs now, on its own disk: bounded, checked, shared by its processes.

A shard is fetched when it is first read, or ahead of that by `prefetch`; it counts only when its bytes have the
checksum of its receipt. The shards used least recently make room for new ones. All processes of a node use one folder:
a lock for each shard keeps two of them from fetching it twice, one for the folder from making room at the same time.
A shard that is removed while another process reads it stays readable there, since it is mapped.
"""

import fcntl
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from audiomae.errors import IntegrityError, UserError
from audiomae.storage import copy_file, is_local, read_json, sha256_file, to_path

GIB = 1 << 30
FETCHERS = 4
ATTEMPTS = 3
MAPPED = 256  # shards kept mapped by one process


class ShardCache:
    """Memory-mapped feature shards of a cache, local or remote.

    Args:
        cache: directory or S3 prefix of the feature cache. A local one is read in place: nothing is copied.
        limit_gib: of disk for what is fetched, on each node.
        folder: where; by default below the temporary folder, so that runs of a node share it.

    Attributes:
        fetched_bytes: fetched by this process.
    """

    def __init__(self, cache: str, limit_gib: float, folder: Path | None = None) -> None:
        self.source = to_path(cache)
        self.limit = int(limit_gib * GIB)
        self.remote = not is_local(self.source)
        self.folder = folder or Path(tempfile.gettempdir()) / "audiomae-features" / self.source.name
        self.fetched_bytes = 0
        self._maps: OrderedDict[int, npt.NDArray[np.float16]] = OrderedDict()
        self._coming: dict[int, Future[Path]] = {}
        self._guard = threading.Lock()
        self._fetchers: ThreadPoolExecutor | None = None
        if self.remote:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, shard: int) -> npt.NDArray[np.float16]:
        """The features float16[frames, mels] of a shard, mapped.

        Raises:
            IntegrityError: the shard is not what its receipt says, after three attempts.
            UserError: the shard alone is larger than the cache may be.
        """
        with self._guard:
            features = self._maps.get(shard)
            if features is not None:
                self._maps.move_to_end(shard)
                return features
            coming = self._coming.pop(shard, None)
        path = coming.result() if coming else self._local(shard)
        try:
            features = np.load(path, mmap_mode="r")
        except FileNotFoundError:  # another process made room between the fetch and now
            features = np.load(self._local(shard), mmap_mode="r")
        with self._guard:
            self._maps[shard] = features
            while len(self._maps) > MAPPED:
                self._maps.popitem(last=False)
        return features

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch these in the background, in this order; those that are there or on their way are left alone."""
        if not self.remote:
            return
        with self._guard:
            for shard in shards:
                if shard not in self._maps and shard not in self._coming:
                    self._coming[shard] = self._pool.submit(self._local, shard)

    def close(self) -> None:
        """Stop fetching ahead."""
        if self._fetchers:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
            self._fetchers = None
        self._coming.clear()

    @property
    def _pool(self) -> ThreadPoolExecutor:
        if self._fetchers is None:
            self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="shards")
        return self._fetchers

    def _local(self, shard: int) -> Path:
        """Where the shard lies on this node, fetched if it must be."""
        name = f"{shard_name(shard)}.npy"
        if not self.remote:
            return Path(str(self.source)) / name
        path = self.folder / name
        with _locked(self.folder / f"{name}.lock"):
            if path.exists():
                os.utime(path)
            else:
                self._fetch(shard, path)
        return path

    def _fetch(self, shard: int, path: Path) -> None:
        receipt = read_json(self.source / f"{shard_name(shard)}.json")
        size = int(receipt["features_bytes"])
        if size > self.limit:
            raise UserError(
                f"shard {shard} of {self.source} has {size / GIB:.2f} GiB, more than data.cache_gib "
                f"{self.limit / GIB:.2f}; raise it"
            )
        with _locked(self.folder / "room.lock"):
            self._make_room(size)
            reserve = self.folder / f"{path.name}.coming"
            reserve.write_bytes(b"")
            os.truncate(reserve, size)  # counts as taken while the bytes come
        got = ""
        try:
            for _ in range(ATTEMPTS):
                copy_file(self.source / path.name, reserve)
                self.fetched_bytes += reserve.stat().st_size
                if (got := sha256_file(reserve)) == receipt["features_sha256"]:
                    reserve.replace(path)
                    return
        finally:
            reserve.unlink(missing_ok=True)
        raise IntegrityError(
            f"{self.source / path.name}: sha256 {got}, expected {receipt['features_sha256']} as in its receipt; delete "
            "the cache directory and run the same command again"
        )

    def _make_room(self, size: int) -> None:
        """Remove the shards used least recently until `size` more bytes fit."""
        files = [(item.stat(), item) for item in self.folder.iterdir() if item.suffix in (".npy", ".coming")]
        taken = sum(stat.st_size for stat, _ in files)
        kept = sorted((stat.st_mtime, item.name, stat.st_size, item) for stat, item in files if item.suffix == ".npy")
        for _, _, bytes_freed, item in kept:
            if taken + size <= self.limit:
                return
            item.unlink(missing_ok=True)
            taken -= bytes_freed


def shard_name(index: int) -> str:
    """File name of a shard, without its ending."""
    return f"shard-{index:05d}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that all processes of this node respect; it ends with the process that holds it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
