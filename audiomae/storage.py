"""Files that are whole or absent, on a local disk or on S3, behind one path type.

Paths are `upath.UPath` (fsspec): `to_path("corpus")` and `to_path("s3://bucket/corpus")` take the same calls. Reading,
writing, listing and removing go through the functions here, which on S3 make as few requests as there can be
(`audiomae/s3.py`): one GET for a read, one PUT for a write, one LIST for a thousand names. Nothing here ever leaves
half a file behind: local writes go to a temporary name in the same folder and are renamed, S3 writes are one PUT.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from upath import UPath

from audiomae import s3
from audiomae.errors import IntegrityError
from audiomae.scratch import scratch_dir

CHUNK_BYTES = 1 << 20
COPY_THREADS = 8


Location = str | os.PathLike[str] | UPath


def to_path(uri: Location) -> UPath:
    """The one path type of the product: an absolute local path or an `s3://bucket/key` path."""
    if isinstance(uri, UPath) and not isinstance(uri, Path):
        return uri
    text = os.fspath(uri)
    if text.startswith("/"):
        return _absolute(text)
    if text.startswith("s3://"):
        return UPath(text, **s3.FSSPEC_OPTIONS)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return UPath(os.path.abspath(os.path.expanduser(text)))


@lru_cache(maxsize=256)
def _absolute(text: str) -> UPath:
    """Making a path takes longer than listing a small folder, and a job asks for the same few all the time."""
    return UPath(os.path.abspath(text))


def below(folder: Location, name: str) -> str:
    """The text of the place `name` has in a folder, which may be a bucket's root and end with a slash.

    As `to_path(folder) / name`, without making paths, which takes longer than to write a small file.
    """
    return f"{_place(folder).rstrip('/')}/{name}"


def arrow_filesystem(uri: Location) -> tuple[Any, str]:
    """(pyarrow filesystem, path in it), for libraries that want one; S3 with the same settings as everything here."""
    import pyarrow.fs

    path = to_path(uri)
    if is_local(path):
        return pyarrow.fs.LocalFileSystem(), path.as_posix()
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(path.fs)), path.path


def is_local(path: UPath) -> bool:
    """Whether the path lies on a disk of this machine."""
    return isinstance(path, Path)


def write_bytes(path: Location, data: bytes) -> None:
    """Write `data` whole or not at all, replacing what was there."""
    place = _place(path)
    if place.startswith("s3://"):
        s3.write(place, data)
    else:
        os.replace(_write_temporary(place, data), place)


def put_if_absent(path: Location, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; of several writers exactly one gets `True`.

    Locally this is a hard link to a finished file without a name (with a temporary one where the disk has no such), of
    which a killed writer leaves nothing behind; on S3 a conditional put (`If-None-Match: *`).
    """
    place = _place(path)
    if place.startswith("s3://"):
        return s3.write(place, data, if_absent=True)
    created = _link_unnamed(place, data)
    if created is None:
        temporary = _write_temporary(place, data)
        try:
            created = _linked(temporary, place)
        finally:
            os.unlink(temporary)
    return created


def exists(path: Location) -> bool:
    """Whether there is such a file."""
    place = _place(path)
    return bool(to_path(place).exists()) if place.startswith("s3://") else os.path.exists(place)


def read_bytes(path: Location) -> bytes:
    """The whole file; on S3 a single GET, so that an object may be replaced meanwhile."""
    place = _place(path)
    return s3.read(place)[0] if place.startswith("s3://") else Path(place).read_bytes()


def open_stream(path: Location) -> BinaryIO:
    """The file, open for reading once from start to end in bounded memory."""
    path = to_path(path)
    return Path(str(path)).open("rb") if is_local(path) else s3.open_stream(str(path))


def open_seekable(path: Location, size: int | None = None) -> BinaryIO:
    """The file, open for reading parts of it; knowing its `size` in bytes saves a request on S3."""
    path = to_path(path)
    return Path(str(path)).open("rb") if is_local(path) else s3.open_seekable(str(path), size)


def list_names(directory: Location) -> list[str]:
    """Names directly in a directory, sorted; none when it does not exist."""
    path = to_path(directory)
    if not is_local(path):
        return s3.list_names(str(path))
    try:
        return sorted(os.listdir(str(path)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_identities(directory: Location) -> dict[str, str]:
    """Name -> what tells whether a file is still the same (ETag; size and time of change) of files in a directory."""
    path = to_path(directory)
    if not is_local(path):
        return {entry.name: entry.etag for entry in s3.list_objects(str(path)) if "/" not in entry.name}
    try:
        with os.scandir(str(path)) as found:
            stats = {item.name: item.stat() for item in found if item.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {name: f"{stats[name].st_size}-{stats[name].st_mtime_ns}" for name in sorted(stats)}


def remove(path: Location) -> None:
    """Remove a file, if it is there."""
    place = _place(path)
    if place.startswith("s3://"):
        s3.delete(place)
    else:
        Path(place).unlink(missing_ok=True)


def remove_tree(directory: Location) -> None:
    """Remove a directory and all that is in it, if it is there."""
    path = to_path(directory)
    if is_local(path):
        shutil.rmtree(str(path), ignore_errors=True)
    else:
        s3.delete(str(path), [entry.name for entry in s3.list_objects(str(path))])


def write_json(path: Location, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    write_bytes(path, encode_json(value))


def read_json(path: Location) -> Any:
    """The JSON value in the file."""
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise IntegrityError(
            f"{path}: not valid JSON ({error}); it was not written by this product: restore it"
        ) from None


def encode_json(value: Any) -> bytes:
    """The one JSON spelling of the product, so that equal values have equal checksums."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Location) -> str:
    """Hex SHA-256 of a file, read in bounded memory."""
    with open_stream(path) as file:
        return sha256_stream(file)[0]


def sha256_stream(file: BinaryIO) -> tuple[str, int]:
    """(hex SHA-256, number of bytes) of the rest of an open file, read in bounded memory."""
    digest, count = hashlib.sha256(), 0
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        count += len(chunk)
    return digest.hexdigest(), count


def list_sizes(directory: Location) -> dict[str, int]:
    """Bytes of every file below `directory` by its relative posix name, sorted; nothing when it does not exist."""
    root = to_path(directory)
    if not is_local(root):
        return {entry.name: entry.size for entry in s3.list_objects(str(root))}
    found = {}
    for folder, _, names in os.walk(str(root)):
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                found[path.relative_to(str(root)).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def walk_files(directory: Location) -> Iterator[tuple[str, UPath]]:
    """Every file below `directory` as (relative posix name, path), sorted by name."""
    root = to_path(directory)
    yield from ((name, root / name) for name in list_sizes(root))


def copy_tree(source: Location, target: Location) -> None:
    """Copy every file below `source` to `target`, each whole or absent, several at a time."""
    target = to_path(target)
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        for _ in pool.map(lambda pair: copy_file(pair[1], target / pair[0]), walk_files(source)):
            pass


def copy_file(source: Location, target: Location) -> None:
    """Copy one file; a local target is renamed into place, a local file goes to S3 as one (multipart) upload."""
    source, target = to_path(source), to_path(target)
    if not is_local(target):
        if is_local(source):
            target.fs.put_file(str(source), target.path)
        else:
            write_bytes(target, read_bytes(source))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(_temporary_name(str(target)))
    try:
        with open_stream(source) as reader, temporary.open("wb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK_BYTES)
        os.replace(temporary, str(target))
    finally:
        temporary.unlink(missing_ok=True)


def fetch_dir(uri: Location) -> Path:
    """A local directory with the content of `uri`: itself when local, else a fresh copy below the temporary folder."""
    path = to_path(uri)
    if is_local(path):
        return Path(str(path))
    target = scratch_dir("copy")
    copy_tree(path, target)
    return target


def _place(path: Location) -> str:
    """The text of `to_path`; what is absolute becomes no path, which takes longer than to write a small file."""
    if isinstance(path, str) and (path.startswith("s3://") or os.path.isabs(path)):
        return path
    return str(to_path(path))


def _temporary_name(place: str) -> str:
    folder, _, name = place.rpartition("/")
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def _link_unnamed(place: str, data: bytes) -> bool | None:
    """Create `place` from a file without a name; False when it exists, None where that cannot be done."""
    folder = os.path.dirname(place)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o666)
    except (OSError, AttributeError):  # a network disk, another system; whatever else it is shows on the other way
        return None
    with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
        _store(file, data)
        unnamed = f"/proc/self/fd/{descriptor}"
        try:
            return _linked(unnamed, place, src_dir_fd=descriptor) if os.path.lexists(unnamed) else None
        except FileNotFoundError:  # the folder was removed meanwhile
            raise
        except OSError:
            return None


def _store(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _linked(source: str, place: str, src_dir_fd: int | None = None) -> bool:
    """Link a file; any `src_dir_fd` makes Python follow a source that is a symbolic link, as those of /proc are."""
    try:
        os.link(source, place, src_dir_fd=src_dir_fd)
    except FileExistsError:
        return False
    return True


def _write_temporary(place: str, data: bytes) -> str:
    temporary = _temporary_name(place)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            _store(file, data)
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary
