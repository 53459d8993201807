"""A published index version: a manifest over immutable pieces, checksummed, found by a pointer.

    INDEX/
      LATEST                  the name of the version in force, for people and scripts; a hint, never the truth
      history/000003.json     one file per publish or rollback, created exclusively; the highest number is the truth
      v000002/                release.json (the manifest), deleted.npy, blocked_ids.npy, encoder/
      segments/000000-ab12/   rows with all that belongs to them, shared by the versions that name them
      quantisers/000000-ef34/ what their inverted lists have in common

A version directory is written under a claimed number, its receipt `release.json` last, and counts only once a history
entry names it. `release.json` has the SHA-256 of every file of the version and of the receipt of every piece, which
has those of the piece's files. Two builds that started from the same version race for the same history number and
exactly one wins, locally (hard link) and on S3 (conditional put) alike; the loser learns that its base is outdated and
publishes nothing. Nothing is ever changed in place, so a process that maps an old version keeps it.

The number before a piece's name, and in whatever else a build leaves on its way, is that of the history entry it was
started from: once a later one is there, the build can publish nothing any more and what it left is garbage.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from upath import UPath

from audiomae import storage
from audiomae.artifacts import receipts
from audiomae.artifacts.receipts import FileEntry, Numbered, Receipt
from audiomae.artifacts.release_files import FIX, RELEASE_FILE, pieces
from audiomae.artifacts.release_files import Release as Release
from audiomae.artifacts.release_files import fetch as fetch
from audiomae.artifacts.release_files import verify as verify
from audiomae.config import nearest
from audiomae.errors import IntegrityError, ReleaseConflictError, UserError
from audiomae.scratch import scratch
from audiomae.storage import Location

FORMAT = 2
CLAIM = "CLAIM"
STAGING_PREFIX = ".staging-"
REMOVING_PREFIX = ".removing-"
PIECE_FOLDERS = ("segments", "quantisers", "parts")
REPORTS_FOLDER = "reports"  # one page a version, for people; nothing reads them
UNSEALED_ENTRY = frozenset({"version", "release_sha256", "action", "time", "by"})  # of older versions
_VERSION = re.compile(r"v(\d{6})")


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
    target = _claim(root, parent)
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
def staging(index_dir: Location, parent: Release | None = None) -> Iterator[Path]:
    """A local directory to prepare a release in, beside a local INDEX so that publishing renames; removed after."""
    with work_folder(index_dir, f"{sequence_of(parent):06d}-") as path:
        yield path


@contextmanager
def work_folder(index_dir: Location, name: str) -> Iterator[Path]:
    """A local directory to make something for INDEX in, beside a local one so that publishing renames."""
    root = storage.to_path(index_dir)
    if not storage.is_local(root):
        with scratch("staging") as path:
            yield path
        return
    root.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{name}", dir=str(root)))
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


def sequence_of(parent: Release | None) -> int:
    """The history entry that a build on `parent` starts from."""
    return parent.sequence if parent else 0


def create_piece(index_dir: Location, name: str, work: Path, facts: Mapping[str, Any]) -> None:
    """Move the finished files below `work` to the piece `name`, its receipt last.

    Builds that do the same work write the same bytes, so what another one put there meanwhile stays.
    """
    target = storage.to_path(index_dir) / name
    receipt = receipts.describe(work, [path for path, _ in storage.walk_files(work)], facts)
    for path in receipt.files:
        _move(work / path, target / path)
    receipts.create(target / receipts.RECEIPT_FILE, receipt)


def read_piece(index_dir: Location, name: str) -> tuple[Receipt, str] | None:
    """The receipt of a piece and its SHA-256; None when the piece is not finished."""
    path = storage.to_path(index_dir) / name / receipts.RECEIPT_FILE
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    return Receipt.decode(receipts.unseal(path, data, fix=FIX), path), storage.sha256_bytes(data)


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
    """Remove what nothing needs any more; returns the names removed.

    That is: all but the last `keep` versions that were in force (never the one in force); segments and quantisers
    that no kept version names; and what builds left that can no longer publish, because another version was put in
    force since they started. What belongs to a build on the version in force is left alone: it may be running, or be
    resumed.
    """
    root = storage.to_path(index_dir)
    entries = history(root)
    numbers = entries.numbers()
    published = [entries.read(number)["version"] for number in reversed(numbers)]
    kept = list(dict.fromkeys(published))[: max(keep, 1)]
    current = numbers[-1] if numbers else 0
    removed = []
    for path in _versions(root):
        # a version that history does not name may be about to be published
        if path.name not in kept and (path.name in published or _is_outdated_claim(path, current)):
            removed.append(path)
    needed = {name for version in kept for name in pieces(_named(root, version))}
    for folder in PIECE_FOLDERS:
        names = [f"{folder}/{name}" for name in storage.list_names(root / folder)]
        removed += [root / name for name in names if name not in needed and _is_outdated(name, current)]
    for name in storage.list_names(root):
        if name.startswith(REMOVING_PREFIX) or (name.startswith(STAGING_PREFIX) and _is_outdated(name, current)):
            removed.append(root / name)
    reports = [name for name in storage.list_names(root / REPORTS_FOLDER) if name.partition(".")[0] not in kept]
    for name in reports:
        storage.remove(root / REPORTS_FOLDER / name)
    for path in removed:
        _remove(path)
    return [path.path.removeprefix(root.path).strip("/") for path in removed]


def _named(root: UPath, version: str) -> Release:
    try:
        receipt = _read_receipt(root / version)
    except (FileNotFoundError, IntegrityError):
        return Release(root / version, {}, {})
    return Release(root / version, receipt.facts, receipt.files)


def _is_outdated(name: str, current: int) -> bool:
    """Whether a build that left this started from an earlier history entry than the last."""
    found = re.search(r"(?:^|[/-])(\d{6,})-", name)
    return found is None or int(found[1]) < current


def _is_outdated_claim(path: UPath, current: int) -> bool:
    try:
        return int(storage.read_json(path / CLAIM)["base"]) < current
    except (OSError, IntegrityError, KeyError, TypeError, ValueError):
        return current > 0


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


def _claim(root: UPath, parent: Release | None) -> UPath:
    number = max((int(path.name[1:]) for path in _versions(root)), default=0) + 1
    claim = storage.encode_json({"by": _who(), "base": sequence_of(parent), "claim": uuid.uuid4().hex})
    while not _claimed(root / f"v{number:06d}", claim):
        number += 1
    return root / f"v{number:06d}"


def _claimed(path: UPath, claim: bytes) -> bool:
    try:
        return receipts.create_exclusively(path / CLAIM, claim)
    except FileNotFoundError:  # whoever had it was just removing it
        return False


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
        aside = path
        if not path.name.startswith(REMOVING_PREFIX):
            root = path.parent if path.parent.name not in PIECE_FOLDERS else path.parent.parent
            aside = root / f"{REMOVING_PREFIX}{uuid.uuid4().hex}"
            try:
                os.rename(path.path, aside.path)
            except FileNotFoundError:
                return  # another build was faster
        shutil.rmtree(aside.path, ignore_errors=True)
        return
    last = (CLAIM, RELEASE_FILE, receipts.RECEIPT_FILE)
    for name in sorted(storage.list_sizes(path), key=lambda name: name in last):
        storage.remove(path / name)


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}:{os.getpid()}"
