"""A published index version: one directory that is enough to serve, checksummed, immutable, found by a pointer.

    INDEX/
      LATEST                 the name of the version in force, for people and scripts; a hint, never the truth
      history/000003.json    one file per publish or rollback, created exclusively; the highest number is the truth
      v000002/               release.json, index files, ids, items table, encoder/

A version directory is written under a claimed number, `release.json` (with the SHA-256 of every other file) last, and
counts only once a history entry names it. Two builds that started from the same version race for the same history
number and exactly one wins, locally (hard link) and on S3 (conditional put) alike; the loser learns that its base is
outdated and publishes nothing. Nothing is ever changed in place, so a process that maps an old version keeps it.
"""

import argparse
import getpass
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from audiomae import storage
from audiomae.cli import run_job
from audiomae.config import nearest
from audiomae.errors import IntegrityError, ReleaseConflictError, UserError
from audiomae.storage import Location

FORMAT = 1
RELEASE_FILE = "release.json"
CLAIM = "CLAIM"
STAGING_PREFIX = ".staging-"
STALE_CLAIM_S = 24 * 3600.0
_VERSION = re.compile(r"v(\d{6})")


@dataclass(frozen=True)
class Release:
    """One published version.

    Attributes:
        path: its directory, local or on S3.
        info: the content of release.json.
        sequence: the history number that put it in force; 0 for a directory opened by itself.
        checksum: SHA-256 of release.json as history recorded it; empty for a directory opened by itself.
    """

    path: UPath
    info: Mapping[str, Any]
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
        info: what release.json says beside `version`, `created`, `parent`, `format` and `checksums`.
        parent: the version that this one was built from; it must still be the one in force.

    Raises:
        ReleaseConflictError: another version was published after `parent`; nothing is left behind.
    """
    root = storage.to_path(index_dir)
    checksums = _checksums(staging)
    target = _claim(root)
    for name in checksums:
        _move(staging / name, target / name)
    content = dict(info) | {
        "format": FORMAT,
        "version": target.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parent": parent.version if parent else None,
        "checksums": checksums,
    }
    data = storage.encode_json(content)
    storage.write_bytes(target / RELEASE_FILE, data)
    try:
        sequence = _enter(root, target.name, storage.sha256_bytes(data), "publish", parent)
    except ReleaseConflictError:
        _remove(target)
        raise
    return Release(target, content, sequence, storage.sha256_bytes(data))


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
        IntegrityError: release.json is unreadable, or of a format that this code does not know.
    """
    root = storage.to_path(index_dir)
    numbers = _history(root)
    if not numbers:
        if version in ("latest", root.name) and (root / RELEASE_FILE).exists():
            return Release(root, _read_info(root))
        raise UserError(f"no index release at {root}: build one with ray_jobs/build_index.py --out {root}")
    names = []
    for number in reversed(numbers):
        entry = _entry(root, number)
        names.append(entry["version"])
        if version in ("latest", entry["version"]):
            break
    else:
        raise UserError(f"no version {version!r} at {root}{nearest(version, sorted(set(names)))}")
    path = root / entry["version"]
    if not (path / RELEASE_FILE).exists():
        raise UserError(f"version {entry['version']} of {root} was removed (gc): name a newer one, or 'latest'")
    return Release(path, _read_info(path), number, entry["release_sha256"])


def resolve_or_none(index_dir: Location) -> Release | None:
    """The release in force, or None where nothing was published yet."""
    root = storage.to_path(index_dir)
    return resolve(root) if _history(root) else None


def verify(release: Release) -> None:
    """Check every file of the release against its recorded SHA-256, before anything parses it.

    Raises:
        IntegrityError: the first file that is missing or different, what was got and expected, and the way out.
    """
    fix = "roll back with `python -m audiomae.artifacts.releases rollback INDEX`, or build the index again"
    if release.checksum:
        _compare(release.path / RELEASE_FILE, release.checksum, fix)
    files = sorted(release.info["checksums"].items())
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda item: _compare(release.path / item[0], item[1], fix), files))


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
    copy = Release(storage.to_path(target), release.info, release.sequence, key)
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
        verify(Release(storage.to_path(temporary), release.info, release.sequence, key))
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
    return Release(target.path, target.info, sequence, target.checksum)


def gc(index_dir: Location, keep: int = 2) -> list[str]:
    """Remove all but the last `keep` versions that were in force, and what dead builds left over a day ago.

    Returns the names removed. The version in force is never removed.
    """
    root = storage.to_path(index_dir)
    published = [_entry(root, number)["version"] for number in reversed(_history(root))]
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
    path = root / "history" / f"{sequence:06d}.json"
    if max(_history(root), default=0) >= sequence or not storage.put_if_absent(path, storage.encode_json(entry)):
        raise ReleaseConflictError(
            f"{root}: another version was put in force while {version} was made from "
            f"{parent.version if parent else 'nothing'}; run the same command again to build on the newer one"
        )
    storage.write_bytes(root / "LATEST", f"{version}\n".encode())
    return sequence


def _claim(root: UPath) -> UPath:
    number = max((int(path.name[1:]) for path in _versions(root)), default=0) + 1
    claim = storage.encode_json({"by": _who(), "time": time.time()})
    while not _claimed(root / f"v{number:06d}", claim):
        number += 1
    return root / f"v{number:06d}"


def _claimed(path: UPath, claim: bytes) -> bool:
    try:
        return storage.put_if_absent(path / CLAIM, claim)
    except FileNotFoundError:  # whoever had it was just removing it
        return False


def _is_stale(path: UPath) -> bool:
    try:
        return bool(time.time() - storage.read_json(path / CLAIM)["time"] > STALE_CLAIM_S)
    except (OSError, IntegrityError, KeyError):
        return True


def _history(root: UPath) -> list[int]:
    folder = root / "history"
    return sorted(int(p.stem) for p in folder.iterdir() if p.suffix == ".json") if folder.exists() else []


def _entry(root: UPath, number: int) -> dict[str, Any]:
    entry: dict[str, Any] = storage.read_json(root / "history" / f"{number:06d}.json")
    return entry


def _versions(root: UPath) -> list[UPath]:
    if not root.exists():
        return []
    return sorted((p for p in root.iterdir() if _VERSION.fullmatch(p.name)), key=lambda p: p.name)


def _read_info(path: UPath) -> dict[str, Any]:
    info = storage.read_json(path / RELEASE_FILE)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        got = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise IntegrityError(
            f"{path / RELEASE_FILE}: release format {got!r}, expected {FORMAT}; open it with the version of this "
            "package that wrote it, or build the index again"
        )
    return info


def _checksums(staging: Path) -> dict[str, str]:
    names = [name for name, _ in storage.walk_files(staging)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: storage.sha256_file(staging / name), names), strict=True))


def _compare(path: UPath, expected: str, fix: str) -> None:
    try:
        got = storage.sha256_file(path)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing, expected SHA-256 {expected}; {fix}") from None
    if got != expected:
        raise IntegrityError(f"{path}: corrupted: got SHA-256 {got}, expected {expected}; {fix}")


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
    files = [item for _, item in storage.walk_files(path)]
    for item in sorted(files, key=lambda item: item.name == CLAIM):
        item.unlink()


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}:{os.getpid()}"


def main(argv: list[str] | None = None) -> int:
    """`list`, `verify`, `rollback` or `gc` an INDEX from the shell."""
    parser = argparse.ArgumentParser(prog="python -m audiomae.artifacts.releases", description=main.__doc__)
    parser.add_argument("action", choices=["list", "verify", "rollback", "gc"])
    parser.add_argument("index", help="the INDEX directory, local or s3://")
    parser.add_argument("--version", help="a version name (verify: default the one in force; rollback: its parent)")
    parser.add_argument("--keep", type=int, default=2, help="gc: how many versions to keep (default 2)")
    args = parser.parse_args(argv)
    if args.action == "list":
        root = storage.to_path(args.index)
        for number in _history(root):
            entry = _entry(root, number)
            print(f"{number:6d}  {entry['action']:8s}  {entry['version']}  by {entry['by']}")
    elif args.action == "verify":
        release = resolve(args.index, args.version or "latest")
        verify(release)
        print(f"{release.version}: {len(release.info['checksums'])} files match their checksums")
    elif args.action == "rollback":
        print(f"in force: {rollback(args.index, args.version).version}")
    else:
        print(f"removed: {', '.join(gc(args.index, args.keep)) or 'nothing'}")
    return 0


if __name__ == "__main__":
    run_job(main)
