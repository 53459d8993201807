"""The files of a release: checked before anything parses them, once per node; on S3 fetched into a cache, once each.

The cache lies at `$AUDIOMAE_CACHE` (default `~/.cache/audiomae`). `checked/` remembers which large files were found
whole: a file that has kept its inode, size and times since is not read again for a day, and of several processes that
open a release at once one reads. `indexes/` holds copies of what lies on S3, laid out as in INDEX; what was not used
for a week is removed by the next fetch.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upath import UPath

from audiomae import storage
from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import FileEntry, Receipt
from audiomae.errors import IntegrityError

RELEASE_FILE = "release.json"
FIX = "roll back with `python -m audiomae.artifacts rollback INDEX`, or build the index again"
CHECKED_FOR_S = 24 * 3600.0
UNUSED_FOR_S = 7 * 24 * 3600.0
SMALL_BYTES = 1 << 20  # read every time
THREADS = 8
USED_FILE = ".used"

Needed = Callable[[str], bool]


@dataclass(frozen=True)
class Release:
    """One published version.

    Attributes:
        path: its directory, local or on S3.
        info: the facts of release.json.
        files: what release.json says of every other file, by name.
        sequence: the history number that put it in force; 0 for a directory opened by itself.
        checksum: SHA-256 of release.json as history recorded it; empty for a directory opened by itself.
    """

    path: UPath
    info: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    sequence: int = 0
    checksum: str = ""

    @property
    def version(self) -> str:
        """The name of the version, such as `v000003`."""
        return str(self.info["version"])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder whose vectors are indexed."""
        return str(self.info["fingerprint"])


def pieces(release: Release) -> dict[str, str]:
    """The pieces of a release, relative to INDEX, each with the SHA-256 of its receipt."""
    found: dict[str, str] = release.info.get("pieces", {})
    return found


def verify(release: Release, needed: Needed | None = None) -> None:
    """Check the files of a release, several at a time, before anything parses them.

    Args:
        release: where they lie; a version directory named by itself is checked as well.
        needed: which files, by their names in the version directory or relative to INDEX; all by default.

    Raises:
        IntegrityError: a file that is missing or different, what was got and expected, and the way out.
    """
    entries = _entries(release, needed)
    root = release.path.parent
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda item: _check(root / item[0], item[1]), entries):
            pass


def fetch(release: Release, needed: Needed | None = None) -> Release:
    """The same release on a local disk with its files checked: itself, or copies kept in the cache.

    A copy found damaged is fetched again.

    Raises:
        IntegrityError: as `verify` does.
    """
    if storage.is_local(release.path):
        verify(release, needed)
        return release
    root = release.path.parent
    local = storage.to_path(cache_dir() / "indexes" / storage.sha256_bytes(str(root).encode())[:16])
    entries = _entries(release, needed)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda item: _copy(root / item[0], local / item[0], item[1]), entries):
            pass
    for name in {release.path.name, *pieces(release)}:
        _touch(local / name)
    copy = replace(release, path=local / release.path.name)
    storage.copy_file(release.path / RELEASE_FILE, copy.path / RELEASE_FILE)
    _remove_unused(Path(str(local)))
    return copy


def cache_dir() -> Path:
    """Where copies and what was checked are kept on this machine."""
    return Path(os.environ.get("AUDIOMAE_CACHE", Path.home() / ".cache" / "audiomae"))


def _entries(release: Release, needed: Needed | None) -> list[tuple[str, FileEntry]]:
    """(name relative to INDEX, what it should be) of the files wanted; receipts are checked on the way."""
    if release.checksum:
        receipts.verify_file(release.path, RELEASE_FILE, FileEntry(release.checksum), FIX)
    own = release.path.name
    found = [(f"{own}/{name}", entry) for name, entry in release.files.items() if needed is None or needed(name)]
    root = release.path.parent
    for piece, checksum in pieces(release).items():
        data = receipts.read_file(
            root,
            f"{piece}/{receipts.RECEIPT_FILE}",
            Receipt({f"{piece}/{receipts.RECEIPT_FILE}": FileEntry(checksum)}),
            FIX,
        )
        receipt = Receipt.decode(receipts.unseal(root / piece, data, fix=FIX), root / piece)
        names = [(f"{piece}/{name}", entry) for name, entry in receipt.files.items()]
        found += [(name, entry) for name, entry in names if needed is None or needed(name)]
    return found


def _check(path: UPath, entry: FileEntry) -> None:
    if not storage.is_local(path) or entry.bytes is None or entry.bytes < SMALL_BYTES:
        receipts.verify_file(path.parent, path.name, entry, FIX)
        return
    with _stamp(path, entry) as stamp:
        if stamp is not None and _is_stamped(stamp, path):
            return
        receipts.verify_file(path.parent, path.name, entry, FIX)
        if stamp is not None:
            stamp.write_text(json.dumps(_identity(path)))


@contextmanager
def _stamp(path: UPath, entry: FileEntry) -> Iterator[Path | None]:
    """Where it is noted that a file was checked, locked; None where nothing can be noted."""
    name = storage.sha256_bytes(f"{os.path.realpath(path.path)} {entry.sha256}".encode())[:32]
    folder = cache_dir() / "checked"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / f"{name}.lock").open("w")
    except OSError:
        yield None
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name


def _is_stamped(stamp: Path, path: UPath) -> bool:
    try:
        fresh = time.time() - stamp.stat().st_mtime < CHECKED_FOR_S
        return fresh and json.loads(stamp.read_text()) == _identity(path)
    except (OSError, ValueError):
        return False


def _identity(path: UPath) -> list[int]:
    found = os.stat(path.path)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _copy(source: UPath, target: UPath, entry: FileEntry) -> None:
    if target.exists():
        try:
            _check(target, entry)
            return
        except IntegrityError:
            target.unlink(missing_ok=True)
    try:
        storage.copy_file(source, target)
    except FileNotFoundError:
        raise IntegrityError(f"{source}: missing, but its receipt names it: {FIX}") from None
    try:
        _check(target, entry)
    except IntegrityError:
        target.unlink(missing_ok=True)
        receipts.verify_file(source.parent, source.name, entry, FIX)  # names the place that has to be repaired
        raise


def _touch(folder: UPath) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Path(str(folder / USED_FILE)).touch()


def _remove_unused(local: Path) -> None:
    for used in [*local.glob(f"*/{USED_FILE}"), *local.glob(f"*/*/{USED_FILE}")]:
        try:
            if time.time() - used.stat().st_mtime > UNUSED_FOR_S:
                shutil.rmtree(used.parent, ignore_errors=True)
        except OSError:
            continue
