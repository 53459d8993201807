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
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import FileEntry, Receipt, entry_of_file
from audiomae.errors import IntegrityError, UserError
from audiomae.retries import retry
from audiomae.storage import Location, copy_file, is_local, to_path

FIX = "delete the shard's receipt (the .json beside it) and run the same command again to make it anew"
UNSEALED = frozenset({"clips", "clips_sha256", "features_bytes", "features_sha256"})  # receipts of older versions
GIB = 1 << 30
DEFAULT_GIB = 64.0
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

    def __init__(self, cache: str, limit_gib: float = DEFAULT_GIB, folder: Path | None = None) -> None:
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
            receipts.verify(self.source, read_receipt(self.source, shard), [name], FIX)
            return Path(str(self.source)) / name
        path, entry = self.folder / name, read_receipt(self.source, shard).files[name]
        with _locked(self.folder / f"{name}.lock"):
            try:
                entry.check(path, entry_of_file(path), FIX)
                os.utime(path)
            except (FileNotFoundError, IntegrityError):  # not there yet, or no longer what it was
                path.unlink(missing_ok=True)
                self._fetch(path, entry)
        return path

    def _fetch(self, path: Path, entry: FileEntry) -> None:
        size = entry.bytes or 0
        if size > self.limit:
            raise UserError(
                f"{path.name} of {self.source} has {size / GIB:.2f} GiB, more than data.cache_gib "
                f"{self.limit / GIB:.2f}; raise it"
            )
        reserve = self.folder / f"{path.name}.coming"
        with _locked(self.folder / "room.lock"):
            self._make_room(size)
            reserve.touch()
            os.truncate(reserve, size)  # counts as taken while the bytes come

        def fetch() -> None:
            copy_file(self.source / path.name, reserve)
            self.fetched_bytes += reserve.stat().st_size
            entry.check(self.source / path.name, entry_of_file(reserve), FIX)

        try:
            retry(fetch, lambda error: isinstance(error, IntegrityError), ATTEMPTS)  # cut on its way, perhaps
            with _locked(self.folder / "room.lock"):  # renamed while it is being counted, it would count as nothing
                reserve.replace(path)
        finally:
            reserve.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the shards used least recently until `size` more bytes fit, and what killed processes left behind."""
        files = []
        for item in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another thread or process has just given it up
                if item.suffix in (".coming", ".tmp") and self._is_left_over(item):
                    item.unlink()
                elif item.suffix in (".npy", ".coming"):
                    files.append((item.stat(), item))
        taken = sum(stat.st_size for stat, _ in files)
        kept = sorted((stat.st_mtime, item.name, stat.st_size, item) for stat, item in files if item.suffix == ".npy")
        for _, _, bytes_freed, item in kept:
            if taken + size <= self.limit:
                return
            item.unlink(missing_ok=True)
            taken -= bytes_freed

    def _is_left_over(self, item: Path) -> bool:
        """Whether nobody fetches this half-fetched shard any more: the lock of its shard is free."""
        stem = item.name.lstrip(".").split(".")[0]
        with (self.folder / f"{stem}.npy.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def read_receipt(cache: Location, index: int) -> Receipt:
    """The receipt of one shard, in today's form for older caches too.

    Raises:
        IntegrityError: there is none, or it is damaged.
    """
    stem, root = shard_name(index), to_path(cache)
    path = root / f"{stem}.json"
    try:
        value = receipts.read_sealed(path, UNSEALED, FIX)
    except FileNotFoundError:
        raise IntegrityError(
            f"{root}: {stem} has no receipt, so it was not finished; run the same command again"
        ) from None
    if "facts" in value:
        return Receipt.decode(value, path)
    files = {
        f"{stem}.npy": FileEntry(value["features_sha256"], value["features_bytes"]),
        f"{stem}.parquet": FileEntry(value["clips_sha256"]),
    }
    return Receipt(files, {"clips": value["clips"]})


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
