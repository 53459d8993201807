"""A published index version: one directory that is enough to serve, checksummed, immutable, found by a pointer.

    INDEX/
      LATEST                 the name of the version in force, for people and scripts; a hint, never the truth
      history/000003.json    one file per publish or rollback, created exclusively; the highest number is the truth
      v000002/               release.json, index files, ids, items table, encoder/

A version directory is written under a claimed number, its receipt `release.json` last, and counts only once a history
entry names it. Two builds that started from the same version race for the same history number and exactly one wins,
locally (hard link) and on S3 (conditional put) alike; the loser learns that its base is outdated and publishes nothing.
Nothing is ever changed in place, so a process that maps an old version keeps it.
"""

import getpass
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upath import UPath

from audiomae import storage
from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import FileEntry, Numbered, Receipt
from audiomae.config import nearest
from audiomae.errors import IntegrityError, ReleaseConflictError, UserError
from audiomae.storage import Location

FORMAT = 2
RELEASE_FILE = "release.json"
CLAIM = "CLAIM"
STAGING_PREFIX = ".staging-"
STALE_CLAIM_S = 24 * 3600.0
FIX = "roll back with `python -m audiomae.artifacts rollback INDEX`, or build the index again"
UNSEALED_ENTRY = frozenset({"version", "release_sha256", "action", "time", "by"})  # of older versions
_VERSION = re.compile(r"v(\d{6})")


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


def publish(index_dir: Location, staging: Path, info: Mapping[str, Any], parent: Release | None = None) -> Release:
    """Publish the files below `staging` as the next version and put it in force.

    Args:
        index_dir: the INDEX directory, local or S3; created when missing.
        staging: a local directory with the finished files; local releases take them over by rename.
        info: what release.json says beside `version`, `created`, `parent` and `format`.
        parent: the version that this one was built from; it must still be the one in force.

    Raises:
        ReleaseConflictError: another version was published after `parent`; nothing is left behind.
    """
    root = storage.to_path(index_dir)
    files = receipts.describe(staging, [name for name, _ in storage.walk_files(staging)]).files
    target = _claim(root)
    for name in files:
        _move(staging / name, target / name)
    facts = dict(info) | {
        "format": FORMAT,
        "version": target.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parent": parent.version if parent else None,
    }
    receipt = Receipt(files, facts)
    receipts.create(target / RELEASE_FILE, receipt)
    checksum = storage.sha256_bytes(receipt.encode())
    try:
        sequence = _enter(root, target.name, checksum, "publish", parent)
    except ReleaseConflictError:
        _remove(target)
        raise
    return Release(target, facts, files, sequence, checksum)


@contextmanager
def staging(index_dir: Location) -> Iterator[Path]:
    """A local directory to prepare a release in, beside a local INDEX so that publishing renames; removed after."""
    root = storage.to_path(index_dir)
    local = storage.is_local(root)
    if local:
        root.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=str(root) if local else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def resolve(index_dir: Location, version: str = "latest") -> Release:
    """The release in force, or a named one; `index_dir` may also be one release directory itself.

    Raises:
        UserError: no release there, or no such version (the nearest name is given).
        IntegrityError: release.json is damaged, or of a format that this code does not know.
    """
    root = storage.to_path(index_dir)
    entries = history(root)
    numbers = entries.numbers()
    if not numbers:
        if version in ("latest", root.name) and (root / RELEASE_FILE).exists():
            receipt = _read_receipt(root)
            return Release(root, receipt.facts, receipt.files)
        raise UserError(f"no index release at {root}: build one with ray_jobs/build_index.py --out {root}")
    names = []
    for number in reversed(numbers):
        entry = entries.read(number)
        names.append(entry["version"])
        if version in ("latest", entry["version"]):
            break
    else:
        raise UserError(f"no version {version!r} at {root}{nearest(version, sorted(set(names)))}")
    path = root / entry["version"]
    try:
        receipt = _read_receipt(path)
    except FileNotFoundError:
        raise UserError(
            f"version {entry['version']} of {root} was removed (gc): name a newer one, or 'latest'"
        ) from None
    return Release(path, receipt.facts, receipt.files, number, entry["release_sha256"])


def resolve_or_none(index_dir: Location) -> Release | None:
    """The release in force, or None where nothing was published yet."""
    root = storage.to_path(index_dir)
    return resolve(root) if history(root).numbers() else None


def verify(release: Release, below: str = "") -> None:
    """Check the files of the release whose names begin with `below`, all by default, before anything parses them.

    Raises:
        IntegrityError: the first file that is missing or different, what was got and expected, and the way out.
    """
    if release.checksum:
        receipts.verify_file(release.path, RELEASE_FILE, FileEntry(release.checksum), FIX)
    names = [name for name in release.files if name.startswith(below)]
    receipts.verify(release.path, Receipt(release.files), names, FIX)


def fetch(release: Release) -> Release:
    """The same release on a local disk with every checksum verified: itself, or a copy kept in a cache.

    The cache lies at `$AUDIOMAE_CACHE` (default `~/.cache/audiomae`), one directory per content of release.json, so
    several processes and restarts of one machine fetch a version once. A copy found damaged is fetched again.

    Raises:
        IntegrityError: as `verify` does.
    """
    if storage.is_local(release.path):
        verify(release)
        return release
    base = Path(os.environ.get("AUDIOMAE_CACHE", Path.home() / ".cache" / "audiomae")) / "releases"
    key = release.checksum or storage.sha256_file(release.path / RELEASE_FILE)
    target = base / key[:32]
    copy = replace(release, path=storage.to_path(target), checksum=key)
    if target.exists():
        try:
            verify(copy)
            return copy
        except IntegrityError:
            shutil.rmtree(target, ignore_errors=True)
    base.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".fetch-", dir=base))
    try:
        storage.copy_tree(release.path, temporary)
        verify(replace(copy, path=storage.to_path(temporary)))
        os.rename(temporary, target)
    except OSError:
        if not target.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return copy


def rollback(index_dir: Location, version: str | None = None) -> Release:
    """Put an earlier version in force again: the parent of the current one, or the one named.

    The bad version stays on disk until `gc`; publishing goes on from the version rolled back to.
    """
    root = storage.to_path(index_dir)
    current = resolve(root)
    name = version or current.info.get("parent")
    if not name:
        raise UserError(f"{current.version} at {root} has no earlier version to roll back to")
    target = resolve(root, name)
    verify(target)
    sequence = _enter(root, target.version, target.checksum, "rollback", current)
    return replace(target, sequence=sequence)


def gc(index_dir: Location, keep: int = 2) -> list[str]:
    """Remove all but the last `keep` versions that were in force, and what dead builds left over a day ago.

    Returns the names removed. The version in force is never removed.
    """
    root = storage.to_path(index_dir)
    entries = history(root)
    published = [entries.read(number)["version"] for number in reversed(entries.numbers())]
    kept = list(dict.fromkeys(published))[: max(keep, 1)]
    removed = []
    for path in _versions(root):
        # a version that history does not name may be about to be published
        if path.name not in kept and (path.name in published or _is_stale(path)):
            _remove(path)
            removed.append(path.name)
    for path in root.glob(f"{STAGING_PREFIX}*"):
        if time.time() - path.stat().st_mtime > STALE_CLAIM_S:
            _remove(path)
            removed.append(path.name)
    return removed


def _enter(root: UPath, version: str, checksum: str, action: str, parent: Release | None) -> int:
    sequence = (parent.sequence if parent else 0) + 1
    entry = {"version": version, "release_sha256": checksum, "action": action, "time": time.time(), "by": _who()}
    entries = history(root)
    if max(entries.numbers(), default=0) >= sequence or not entries.create(sequence, entry):
        raise ReleaseConflictError(
            f"{root}: another version was put in force while {version} was made from "
            f"{parent.version if parent else 'nothing'}; run the same command again to build on the newer one"
        )
    storage.write_bytes(root / "LATEST", f"{version}\n".encode())
    return sequence


def _claim(root: UPath) -> UPath:
    number = max((int(path.name[1:]) for path in _versions(root)), default=0) + 1
    claim = storage.encode_json({"by": _who(), "time": time.time(), "claim": uuid.uuid4().hex})
    while not _claimed(root / f"v{number:06d}", claim):
        number += 1
    return root / f"v{number:06d}"


def _claimed(path: UPath, claim: bytes) -> bool:
    try:
        return receipts.create_exclusively(path / CLAIM, claim)
    except FileNotFoundError:  # whoever had it was just removing it
        return False


def _is_stale(path: UPath) -> bool:
    try:
        return bool(time.time() - storage.read_json(path / CLAIM)["time"] > STALE_CLAIM_S)
    except (OSError, IntegrityError, KeyError):
        return True


def history(index_dir: Location) -> Numbered:
    """Every publish and rollback of an index: {version, release_sha256, action, time, by}."""
    return Numbered(storage.to_path(index_dir) / "history", unsealed=UNSEALED_ENTRY)


def _versions(root: UPath) -> list[UPath]:
    return [root / name for name in storage.list_names(root) if _VERSION.fullmatch(name)]


def _read_receipt(path: UPath) -> Receipt:
    """release.json; that of an older version (format 1) had its facts and checksums side by side."""
    where = path / RELEASE_FILE
    data = storage.read_bytes(where)
    old = _unsealed(data)
    if old is not None:
        files = {name: FileEntry(checksum) for name, checksum in old.pop("checksums").items()}
        return Receipt(files, old)
    receipt = Receipt.decode(receipts.unseal(where, data, fix=FIX), where)
    if receipt.facts.get("format") != FORMAT:
        raise IntegrityError(
            f"{where}: release format {receipt.facts.get('format')!r}, expected {FORMAT}; open it with the version of "
            "this package that wrote it, or build the index again"
        )
    return receipt


def _unsealed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    is_old = isinstance(value, dict) and value.get("format") == 1 and isinstance(value.get("checksums"), dict)
    return value if is_old else None


def _move(source: Path, target: UPath) -> None:
    if not storage.is_local(target):
        storage.copy_file(source, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, str(target))


def _remove(path: UPath) -> None:
    """Remove a directory; its number stays claimed to the end, so that no other build moves in half-way."""
    if storage.is_local(path):
        aside = path.parent / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
        os.rename(path.path, aside.path)
        shutil.rmtree(aside.path)
        return
    for name in storage.list_sizes(path):
        if name != CLAIM:
            storage.remove(path / name)
    storage.remove(path / CLAIM)


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}:{os.getpid()}"
