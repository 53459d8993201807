"""The one way to say that something is finished and whole: a receipt, written last and checked by every reader.

A receipt is a small JSON file:

    {"files": {"vectors.npy": {"bytes": 1280, "sha256": "..."}}, "facts": {"rows": 10}, "seal": "..."}

`files` names what was written before it, relative to a root folder that each artifact fixes; `facts` is whatever the
artifact has to say of itself; `seal` is the SHA-256 of the rest, so that a damaged receipt shows as well. A receipt
is created exclusively: of several writers of one name exactly one counts. Beside receipts there are numbered entries
(`plan-000003.json`, `history/000003.json`), sealed and created in the same way, of which the highest is in force.

What older versions wrote has no seal: a reader may name the keys such a file had (`unsealed`), and takes no others.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from upath import UPath

from audiomae.errors import IntegrityError
from audiomae.storage import (
    Location,
    encode_json,
    list_names,
    open_stream,
    put_if_absent,
    read_bytes,
    remove,
    sha256_bytes,
    sha256_stream,
    to_path,
    write_bytes,
)

RECEIPT_FILE = "receipt.json"
SEAL = "seal"
RESTORE = "restore it from a copy, or make it again"
VERIFY_THREADS = 4


@dataclass(frozen=True)
class FileEntry:
    """What a receipt says of one file. `bytes` is None where an older version did not record it."""

    sha256: str
    bytes: int | None = None

    def check(self, path: object, got: "FileEntry", fix: str = RESTORE) -> None:
        """Compare with what was read from `path`.

        Raises:
            IntegrityError: the file was cut or changed.
        """
        if self.bytes is not None and got.bytes != self.bytes:
            raise IntegrityError(
                f"{path}: damaged: {got.bytes:,} bytes, expected {self.bytes:,} as its receipt says: {fix}"
            )
        if got.sha256 != self.sha256:
            raise IntegrityError(
                f"{path}: damaged: got sha256 {got.sha256}, expected {self.sha256} as its receipt says: {fix}"
            )


def entry_of(data: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(sha256_bytes(data), len(data))


def entry_of_file(path: Location) -> FileEntry:
    """The entry of a stored file, read in bounded memory."""
    with open_stream(path) as file:
        return FileEntry(*sha256_stream(file))


@dataclass(frozen=True)
class Receipt:
    """Files by name below the artifact's root, and facts."""

    files: Mapping[str, FileEntry] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The bytes of the receipt, sealed."""
        return seal({"files": {name: asdict(entry) for name, entry in self.files.items()}, "facts": dict(self.facts)})

    @classmethod
    def decode(cls, value: Mapping[str, Any], path: object) -> "Receipt":
        """From the content of a receipt. IntegrityError when it is none."""
        try:
            files = {_safe_name(name): FileEntry(**entry) for name, entry in value["files"].items()}
            return cls(files, dict(value["facts"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{path}: not a receipt ({type(error).__name__}: {error}): {RESTORE}") from None


def describe(root: Location, names: Iterable[str], facts: Mapping[str, Any] | None = None) -> Receipt:
    """A receipt for files that lie below `root` already, by reading them."""
    root, names = to_path(root), sorted(names)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        entries = list(pool.map(lambda name: entry_of_file(root / name), names))
    return Receipt(dict(zip(names, entries, strict=True)), facts or {})


def create(path: Location, receipt: Receipt) -> bool:
    """Put a receipt in force; False when another writer's is there already."""
    return create_exclusively(path, receipt.encode())


def read(path: Location, fix: str = RESTORE) -> Receipt:
    """The receipt at `path`.

    Raises:
        FileNotFoundError: there is none, so the artifact was not finished.
        IntegrityError: it is damaged.
    """
    return Receipt.decode(read_sealed(path, fix=fix), path)


def read_result(path: Location, unsealed: Collection[str] = (), fix: str = RESTORE) -> Receipt:
    """The receipt at `path`; a file of an older version that had only facts, with these keys, is one without files.

    Raises:
        FileNotFoundError, IntegrityError: as `read` does.
    """
    value = read_sealed(path, unsealed, fix)
    return Receipt.decode(value, path) if "facts" in value else Receipt({}, value)


def withdraw(path: Location) -> None:
    """Take a receipt back before its files are written anew."""
    remove(path)


def read_file(root: Location, name: str, receipt: Receipt, fix: str = RESTORE) -> bytes:
    """The bytes of one file of an artifact, checked before anything parses them.

    Raises:
        IntegrityError: the file is missing, cut or changed, or not one of the receipt's.
    """
    path = to_path(root) / name
    if name not in receipt.files:
        raise IntegrityError(f"{path}: its receipt does not name it: {fix}")
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise _missing(path, fix) from None
    receipt.files[name].check(path, entry_of(data), fix)
    return data


def verify_file(root: Location, name: str, entry: FileEntry, fix: str = RESTORE) -> int:
    """Check one stored file in bounded memory; its bytes. IntegrityError as for `read_file`."""
    path = to_path(root) / name
    try:
        got = entry_of_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, fix) from None
    entry.check(path, got, fix)
    return got.bytes or 0


def verify(root: Location, receipt: Receipt, names: Iterable[str] | None = None, fix: str = RESTORE) -> None:
    """Check all files of an artifact, or those named, several at a time. IntegrityError names the first bad one."""
    chosen = sorted(receipt.files if names is None else names)
    check = partial(_verify_named, root, receipt, fix)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        for _ in pool.map(check, chosen):
            pass


# --- sealed JSON, exclusive creation, numbered entries ----------------------------------------------------------------


def seal(value: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of itself under the key `seal`."""
    body = encode_json(dict(value))
    digest = sha256_bytes(body)
    if value and max(value) < SEAL:  # keys are sorted: it comes last, and the rest need not be written twice
        return body.removesuffix(b"\n}\n") + f',\n  "{SEAL}": "{digest}"\n}}\n'.encode()
    return encode_json({**value, SEAL: digest})


def unseal(path: object, data: bytes, unsealed: Collection[str] = (), fix: str = RESTORE) -> dict[str, Any]:
    """The value that `seal` was given.

    Args:
        path: for the message.
        unsealed: the keys of what older versions wrote here without a seal; nothing without a seal is taken if empty.

    Raises:
        IntegrityError: one byte or more of it was changed.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{path}: damaged: not valid JSON ({error}): {fix}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: damaged: got a JSON {type(value).__name__}, expected an object: {fix}")
    expected = value.pop(SEAL, None)
    if expected is None and value and set(value) <= set(unsealed):
        return value
    got = sha256_bytes(encode_json(value))
    if got != expected or seal(value) != data:
        raise IntegrityError(
            f"{path}: damaged: its content has sha256 {got}, expected {expected or 'that under its key `seal`'}: {fix}"
        )
    return value


def write_sealed(path: Location, value: Mapping[str, Any]) -> None:
    """Write a sealed record that may change later, such as run.json."""
    write_bytes(path, seal(value))


def read_sealed(path: Location, unsealed: Collection[str] = (), fix: str = RESTORE) -> dict[str, Any]:
    """What `write_sealed` or `create_exclusively(path, seal(...))` wrote. Errors as `unseal`."""
    return unseal(path, read_bytes(path), unsealed, fix)


def create_exclusively(path: Location, data: bytes) -> bool:
    """Create a file that must not exist; of several writers exactly one gets True.

    A conditional put that was sent again after a lost answer is refused because of our own first one: a refusal is
    therefore compared with what is stored.
    """
    return put_if_absent(path, data) or read_bytes(path) == data


@dataclass(frozen=True)
class Numbered:
    """Numbered, immutable entries in one folder (`<prefix>000000.json`); the highest number is in force.

    Attributes:
        folder: local or S3.
        prefix: of the file names.
        unsealed: keys of entries that older versions wrote without a seal.
    """

    folder: UPath
    prefix: str = ""
    unsealed: frozenset[str] = frozenset()

    def path(self, number: int) -> UPath:
        """Where an entry lies."""
        return self.folder / f"{self.prefix}{number:06d}.json"

    def numbers(self) -> list[int]:
        """All numbers taken, ascending, by listing the folder once."""
        pattern = re.compile(re.escape(self.prefix) + r"(\d{6,})\.json")
        return sorted(int(found[1]) for name in list_names(self.folder) if (found := pattern.fullmatch(name)))

    def create(self, number: int, value: Mapping[str, Any]) -> bool:
        """Add an entry; False when the number is taken."""
        return create_exclusively(self.path(number), seal(value))

    def read(self, number: int) -> dict[str, Any]:
        """The content of an entry. IntegrityError when it is damaged."""
        return read_sealed(self.path(number), self.unsealed)

    def latest(self) -> dict[str, Any] | None:
        """The entry in force, or None."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None


def _verify_named(root: Location, receipt: Receipt, fix: str, name: str) -> None:
    if name not in receipt.files:
        raise IntegrityError(f"{to_path(root) / name}: its receipt does not name it: {fix}")
    verify_file(root, name, receipt.files[name], fix)


def _missing(path: object, fix: str) -> IntegrityError:
    return IntegrityError(f"{path}: missing, but its receipt names it: {fix}")


def _safe_name(name: str) -> str:
    """A receipt names files below its root and nothing else."""
    if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} is not a path below the root")
    return name
