"""Where the bytes of a corpus file are: a local path, an S3 object, or a member of a tar shard on either."""

import io
import os
import random
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import urllib3.exceptions

from audiomae.corpus.paths import is_s3, join, local_path, scheme_of, split_s3
from audiomae.corpus.tars import Directory, read_directory, split_member
from audiomae.errors import DecodeError

WHOLE_BYTES = 16 << 20  # objects up to this size are read in one go, larger ones through ranged reads
RANGE_BYTES = 4 << 20
ATTEMPTS = 6
BODY_ERRORS = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)


def open_source(root: str, uri: str, offset: int | None = None, size: int | None = None) -> Path | bytes | BinaryIO:
    """What `decode`, `probe` and `iter_windows` take, for one row of a corpus.

    Args:
        root: `Corpus.root`; ignored where `uri` is absolute.
        uri: the row's uri: `a/b.wav`, `/abs/b.wav`, `s3://bucket/key`, or `shard.tar#member.flac`.
        offset: the row's `tar_offset`, if it has one: saves reading the shard's directory.
        size: the row's `size`, with `offset`.

    Returns:
        A local path; or the bytes of an S3 object or tar member up to 16 MiB; or a seekable file for larger ones.

    Raises:
        DecodeError: stage "open" (NotFound, PermissionDenied) or "read" (ReadFailed, after retries).
    """
    full = join(root, uri)
    if member := _tar_member(full, offset):
        return _open_member(*member, offset, size)
    if full.lower().endswith(".tar") and (reason := _tar_as_audio(full)):
        raise reason
    if is_s3(full):
        return _open_s3(full)
    if scheme := scheme_of(full):
        raise DecodeError("open", f"{uri}: {scheme}:// is not read; expected a path, file:// or s3://", "NotFound")
    return local_path(full)


def _tar_member(full: str, offset: int | None) -> tuple[str, str] | None:
    """(tar, member) where `full` names a member of a tar and not a file that is merely called so."""
    splits = list(split_member(full))
    if not splits:
        return None
    if is_s3(full):
        return splits[0] if offset is not None or not _s3_exists(full) else None
    if os.path.lexists(local_path(full)):
        return None
    return next((split for split in splits if os.path.isfile(local_path(split[0]))), splits[0])


def _tar_as_audio(tar: str) -> DecodeError | None:
    """Why a tar shard is itself a row that fails; `None` for what only has the name of one."""
    directory = tar_directory(tar)
    if not directory.members:
        return None
    if directory.fault:
        return DecodeError("open", f"{tar}: {_broken(directory)}", "CorruptAudio")
    return DecodeError("open", f"{tar}: a tar among audio files; give tar shards as a corpus of their own", "NotAFile")


def _broken(directory: Directory) -> str:
    last = next(reversed(directory.members), None)
    where = f"after member {last!r}" if last else "at its start"
    return f"not a whole tar file: {directory.fault}, {where}; the members before are rows of their own"


# --- S3 ---------------------------------------------------------------------------------------------------------------


def s3_client() -> Any:
    """A botocore S3 client: endpoint and credentials from the AWS environment, requests retried with backoff."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _client(endpoint, os.getpid())


@lru_cache(maxsize=2)
def _client(_endpoint: str | None, _process: int) -> Any:
    """One client for each endpoint and process: its connections must not be shared across a fork."""
    config = botocore.config.Config(
        retries={"mode": "standard", "max_attempts": 8},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
    )
    return botocore.session.get_session().create_client("s3", config=config)


def s3_error(uri: str, error: Exception) -> DecodeError:
    """The reason an S3 request failed, in the words of `DecodeError`."""
    code = ""
    if isinstance(error, botocore.exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
    if code in ("404", "NoSuchKey", "NoSuchBucket", "NotFound"):
        return DecodeError("open", f"{uri}: no such object", "NotFound")
    if code in ("403", "AccessDenied", "Forbidden") or isinstance(error, botocore.exceptions.NoCredentialsError):
        return DecodeError("open", f"{uri}: permission denied ({error})", "PermissionDenied")
    return DecodeError("read", f"{uri}: {type(error).__name__}: {error}", "ReadFailed")


def s3_read(uri: str, start: int = 0, count: int | None = None, limit: int | None = None) -> tuple[bytes, int]:
    """(bytes [start, start + count) of an object, its whole size). A body that breaks off is asked for again.

    An object larger than `limit` is not read at all: only its size is given.
    """
    bucket, key = split_s3(uri)
    for attempt in range(ATTEMPTS):
        try:
            extra = {} if count is None else {"Range": f"bytes={start}-{start + count - 1}"}
            reply = s3_client().get_object(Bucket=bucket, Key=key, **extra)
            total = _total_size(reply)
            if limit is not None and total > limit:
                reply["Body"].close()
                return b"", total
            body = reply["Body"].read()
            if len(body) != reply["ContentLength"]:
                raise ConnectionError(f"{len(body)} of {reply['ContentLength']} bytes arrived")
            return body, total
        except BODY_ERRORS as error:
            failure: Exception = error
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidRange":  # an empty object, or past its end
                return b"", start
            raise s3_error(uri, error) from None
        except botocore.exceptions.BotoCoreError as error:
            raise s3_error(uri, error) from None
        if attempt + 1 < ATTEMPTS:
            time.sleep(random.uniform(0.5, 1) * 0.1 * 2**attempt)
    raise s3_error(uri, failure)


def _total_size(reply: dict[str, Any]) -> int:
    content_range = reply.get("ContentRange")
    return int(content_range.rpartition("/")[2]) if content_range else int(reply["ContentLength"])


def _open_s3(uri: str) -> bytes | BinaryIO:
    data, total = s3_read(uri, limit=WHOLE_BYTES)
    return data if total <= WHOLE_BYTES else open_s3_file(uri, total)


def open_s3_file(uri: str, size: int, start: int = 0) -> BinaryIO:
    """A seekable, buffered file over `size` bytes of an S3 object from `start`; 4 MiB of it in memory at a time."""
    return io.BufferedReader(Ranges(lambda at, count: s3_read(uri, start + at, count)[0], size, uri), RANGE_BYTES)


class Ranges(io.RawIOBase):
    """A read-only file made of ranged reads."""

    def __init__(self, read_range: Any, size: int, name: str) -> None:
        self._read_range, self._size, self._position = read_range, size, 0
        self.name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        data = self._read_range(self._position, count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _s3_exists(uri: str) -> bool:
    bucket, key = split_s3(uri)
    try:
        s3_client().head_object(Bucket=bucket, Key=key)
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
        return False
    return True


# --- tar shards -------------------------------------------------------------------------------------------------------


def tar_directory(tar: str, wanted: Any = lambda name, size: False) -> Directory:
    """What a local or S3 tar holds (`tars.read_directory`).

    Raises:
        DecodeError: it cannot be opened or read; a tar that breaks off is no error but has a `fault`.
    """
    with _open_tar_file(tar) as file:
        try:
            return read_directory(file, wanted)
        except OSError as error:
            raise DecodeError("read", f"{tar}: {error}", "ReadFailed") from None


def read_range(file_uri: str, offset: int, size: int) -> bytes:
    """`size` bytes of a local or S3 file."""
    if is_s3(file_uri):
        return s3_read(file_uri, offset, size)[0] if size else b""
    with local_path(file_uri).open("rb") as file:
        return os.pread(file.fileno(), size, offset)


def _open_tar_file(tar: str) -> BinaryIO:
    if is_s3(tar):
        _, total = s3_read(tar, 0, 1)
        return open_s3_file(tar, total)
    return _open_local_file(tar)


def _open_local_file(name: str) -> BinaryIO:
    try:
        return local_path(name).open("rb")
    except FileNotFoundError:
        raise DecodeError("open", f"{name}: no such file", "NotFound") from None
    except PermissionError:
        raise DecodeError("open", f"{name}: permission denied", "PermissionDenied") from None
    except OSError as error:
        raise DecodeError("read", f"{name}: {error}", "ReadFailed") from None


@lru_cache(maxsize=8)
def _cached_directory(tar: str, _identity: tuple[int, int]) -> Directory:
    return tar_directory(tar)


def _open_member(tar: str, name: str, offset: int | None, size: int | None) -> bytes | BinaryIO:
    if offset is None or size is None or size < 0:
        identity = (0, 0)
        if not is_s3(tar):
            with _open_local_file(tar) as file:
                status = os.fstat(file.fileno())
                identity = (status.st_mtime_ns, status.st_size)
        directory = _cached_directory(tar, identity)
        member = directory.members.get(name)
        if member is None:
            broken = f" ({_broken(directory)})" if directory.fault else ""
            raise DecodeError("open", f"{tar}: no member {name!r}{broken}", "NotFound")
        if member.offset is None:
            raise DecodeError("open", f"{tar}#{name}: {member.reason}", "NotFound")
        offset, size = member.offset, member.size
    if size <= WHOLE_BYTES:
        data = read_range(tar, offset, size)
        if len(data) != size:
            raise DecodeError("read", f"{tar}#{name}: {len(data)} of {size} bytes are there", "TruncatedFile")
        return data
    if is_s3(tar):
        return open_s3_file(tar, size, offset)
    start = offset
    return io.BufferedReader(
        Ranges(lambda at, count: read_range(tar, start + at, count), size, f"{tar}#{name}"), RANGE_BYTES
    )
