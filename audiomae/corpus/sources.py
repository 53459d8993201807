"""Where the bytes of a corpus file are: a local path, an S3 object, or a member of a tar shard on either."""

import io
import os
import random
import re
import tarfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import urllib3.exceptions

from audiomae.errors import DecodeError

WHOLE_BYTES = 16 << 20  # objects up to this size are read in one go, larger ones through ranged reads
RANGE_BYTES = 4 << 20
ATTEMPTS = 6
TAR_MEMBER = re.compile(r"(.+?\.tar)#(.+)", re.DOTALL)
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
    member = TAR_MEMBER.fullmatch(full)
    if member:
        return _open_member(member[1], member[2], offset, size)
    if is_s3(full):
        return _open_s3(full)
    return local_path(full)


def join(root: str, uri: str) -> str:
    """`uri` under `root`, or `uri` itself where it is absolute."""
    if not root or uri.startswith("/") or "://" in uri:
        return uri.removeprefix("file://")
    return f"{root.rstrip('/')}/{uri}"


def is_s3(uri: str) -> bool:
    """Whether the URI names an S3 object or prefix."""
    return uri.startswith("s3://")


def name_to_uri(name: bytes) -> str:
    r"""A file name as text. Bytes that are not UTF-8 are spelled `\xNN`; `local_path` finds such a file again."""
    return name.decode("utf-8", "backslashreplace")


def local_path(text: str) -> Path:
    r"""The local path that `text` names, `\xNN` spellings of undecodable bytes included."""
    path = Path(text)
    if "\\x" in text and not os.path.lexists(path):
        raw = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), os.fsencode(text))
        return Path(os.fsdecode(raw))
    return path


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


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


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
    return io.BufferedReader(_Ranges(lambda at, count: s3_read(uri, start + at, count)[0], size, uri), RANGE_BYTES)


class _Ranges(io.RawIOBase):
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


# --- tar shards -------------------------------------------------------------------------------------------------------


def tar_members(tar: str) -> Iterator[tuple[str, int, int]]:
    """(member name, offset of its bytes, size) of every regular file in a local or S3 tar, in order.

    Raises:
        DecodeError: the tar cannot be opened, or is not a tar, or breaks off (after the members before the break).
    """
    with _open_tar_file(tar) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen otherwise
                    if member.isfile():
                        yield member.name, member.offset_data, member.size
        except (tarfile.TarError, EOFError) as error:
            raise DecodeError("open", f"{tar}: not a whole tar file: {error}", "CorruptAudio") from None


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
def _tar_directory(tar: str, _identity: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {name: (offset, size) for name, offset, size in tar_members(tar)}


def _open_member(tar: str, name: str, offset: int | None, size: int | None) -> bytes | BinaryIO:
    if offset is None or size is None:
        identity = (0, 0)
        if not is_s3(tar):
            with _open_local_file(tar) as file:
                status = os.fstat(file.fileno())
                identity = (status.st_mtime_ns, status.st_size)
        place = _tar_directory(tar, identity).get(name)
        if place is None:
            raise DecodeError("open", f"{tar}: no member {name!r}", "NotFound")
        offset, size = place
    if size <= WHOLE_BYTES:
        data = read_range(tar, offset, size)
        if len(data) != size:
            raise DecodeError("read", f"{tar}#{name}: {len(data)} of {size} bytes are there", "TruncatedFile")
        return data
    if is_s3(tar):
        return open_s3_file(tar, size, offset)
    start = offset
    return io.BufferedReader(
        _Ranges(lambda at, count: read_range(tar, start + at, count), size, f"{tar}#{name}"), RANGE_BYTES
    )
