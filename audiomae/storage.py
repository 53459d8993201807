"""Files that are whole or absent, on a local disk or on S3, behind one path type.

Paths are `upath.UPath` (fsspec): `to_path("corpus")` and `to_path("s3://bucket/corpus")` take the same calls. S3
endpoint, region and credentials come from the usual AWS environment variables, `AWS_ENDPOINT_URL` included; requests
are retried with exponential backoff by botocore. Nothing here ever leaves half a file behind: local writes go to a
temporary name in the same folder and are renamed, S3 writes are one PUT.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from upath import UPath

from audiomae.errors import IntegrityError

S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "retries": {"max_attempts": 8, "mode": "standard"},
        "connect_timeout": 10,
        "read_timeout": 60,
    },
    "use_listings_cache": False,
}
CHUNK_BYTES = 1 << 20


Location = str | os.PathLike[str] | UPath


def to_path(uri: Location) -> UPath:
    """The one path type of the product: an absolute local path or an `s3://bucket/key` path."""
    if isinstance(uri, UPath) and not isinstance(uri, Path):
        return uri
    text = os.fspath(uri)
    if text.startswith("s3://"):
        return UPath(text, **S3_OPTIONS)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return UPath(os.path.abspath(os.path.expanduser(text)))


def is_local(path: UPath) -> bool:
    """Whether the path lies on a disk of this machine."""
    return isinstance(path, Path)


def write_bytes(path: Location, data: bytes) -> None:
    """Write `data` whole or not at all, replacing what was there."""
    path = to_path(path)
    if not is_local(path):
        path.fs.pipe_file(path.path, data)
        return
    temporary = _write_temporary(path, data)
    os.replace(temporary, str(path))


def put_if_absent(path: Location, data: bytes) -> bool:
    """Create `path` with `data` unless it exists; of several writers exactly one gets `True`.

    Locally this is a hard link to a finished temporary file, on S3 a conditional put (`If-None-Match: *`).
    """
    path = to_path(path)
    if not is_local(path):
        try:
            path.fs.pipe_file(path.path, data, mode="create")
        except FileExistsError:
            return False
        return True
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, str(path))
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def read_bytes(path: Location) -> bytes:
    """The whole file; on S3 a single GET, so that an object may be replaced meanwhile."""
    path = to_path(path)
    if is_local(path):
        return path.read_bytes()
    data: bytes = path.fs.cat_file(path.path)
    return data


def open_stream(path: Location) -> BinaryIO:
    """The file, open for reading in bounded memory."""
    stream: BinaryIO = to_path(path).open("rb")
    return stream


def list_names(directory: Location) -> list[str]:
    """Names directly in a directory, sorted; none when it does not exist."""
    try:
        return sorted(path.name for path in to_path(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):  # UPath says the latter of an S3 prefix without objects
        return []


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


def walk_files(directory: Location) -> Iterator[tuple[str, UPath]]:
    """Every file below `directory` as (relative posix name, path), sorted by name."""
    root = to_path(directory)
    prefix = root.path.rstrip("/") + "/"
    files = (item for item in root.rglob("*") if item.is_file())
    yield from sorted((item.path.removeprefix(prefix), item) for item in files)


def copy_tree(source: Location, target: Location) -> None:
    """Copy every file below `source` to `target`, each whole or absent."""
    target = to_path(target)
    for name, item in walk_files(source):
        copy_file(item, target / name)


def copy_file(source: Location, target: Location) -> None:
    """Copy one file; a local target is renamed into place, a local file goes to S3 as one (multipart) upload."""
    source, target = to_path(source), to_path(target)
    if not is_local(target):
        if is_local(source):
            target.fs.put_file(str(source), target.path)
        else:
            target.write_bytes(source.read_bytes())
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    with source.open("rb") as reader, temporary.open("wb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)
    os.replace(temporary, str(target))


def fetch_dir(uri: Location) -> Path:
    """A local directory with the content of `uri`: itself when local, else a fresh copy below the temporary folder."""
    path = to_path(uri)
    if is_local(path):
        return Path(str(path))
    target = Path(tempfile.mkdtemp(prefix="audiomae-"))
    copy_tree(path, target)
    return target


def _temporary_name(path: UPath) -> Path:
    return Path(str(path)).parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


def _write_temporary(path: UPath, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
