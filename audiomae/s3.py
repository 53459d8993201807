"""S3 as the whole product uses it: one client setup, one retry policy, one GET for each read and no HEAD before it.

Endpoint, region and credentials come from the usual AWS environment variables, `AWS_ENDPOINT_URL` included. botocore
tries a request again that failed; a body that breaks off, which botocore does not see, is asked for again here.
Errors are Python's own: FileNotFoundError, PermissionError, OSError.
"""

import io
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, BinaryIO, NamedTuple

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import urllib3.exceptions

from audiomae.retries import retry

SETTINGS: dict[str, Any] = {
    "retries": {"max_attempts": 8, "mode": "standard"},
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 32,
}
FSSPEC_OPTIONS: dict[str, Any] = {"config_kwargs": SETTINGS, "use_listings_cache": False}
BODY_ATTEMPTS = 6
RANGE_BYTES = 4 << 20
DELETE_KEYS = 1000  # at once, the most that S3 takes
PAGE_KEYS = 1000
BODY_ERRORS = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
NO_ACCESS = (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)
ACCESS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (AWS_ENDPOINT_URL where it is not Amazon's), or "
    "run on a machine with a role"
)
MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
DENIED = ("403", "AccessDenied", "Forbidden")


class StoredObject(NamedTuple):
    """One object of a listing: its name below the prefix, size in bytes, ETag."""

    name: str
    size: int
    etag: str


def client() -> Any:
    """The botocore client of this process."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _client(endpoint, os.getpid())


@lru_cache(maxsize=2)
def _client(_endpoint: str | None, _process: int) -> Any:
    """One client for each endpoint and process: its connections must not be shared across a fork."""
    return botocore.session.get_session().create_client("s3", config=botocore.config.Config(**SETTINGS))


def split(uri: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def read(uri: str, start: int = 0, count: int | None = None, limit: int | None = None) -> tuple[bytes, int]:
    """(bytes [start, start + count) of an object, its whole size).

    An object larger than `limit` is not read at all: only its size is given.
    """

    def get() -> tuple[bytes, int]:
        reply = _get(uri, start, count)
        if reply is None:
            return b"", start
        total = _total_size(reply)
        if limit is not None and total > limit:
            reply["Body"].close()
            return b"", total
        body = reply["Body"].read()
        if len(body) != reply["ContentLength"]:
            raise ConnectionError(f"{len(body)} of {reply['ContentLength']} bytes arrived")
        return body, total

    return _asked(uri, get)


def head(uri: str) -> StoredObject | None:
    """Size and ETag of an object that is not to be read now; None when there is none."""
    bucket, key = split(uri)
    try:
        reply = _asked(uri, lambda: client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return None
    return StoredObject(key.rpartition("/")[2], reply["ContentLength"], reply["ETag"].strip('"'))


def write(uri: str, data: bytes, if_absent: bool = False) -> bool:
    """Write an object whole by one PUT; False when it must be absent and is not."""
    bucket, key = split(uri)
    extra = {"IfNoneMatch": "*"} if if_absent else {}

    def put() -> bool:
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, **extra)
        except botocore.exceptions.ClientError as error:
            if if_absent and _code(error) in ("PreconditionFailed", "412"):
                return False
            if _code(error) in ("ConditionalRequestConflict", "409"):  # another conditional put is under way
                raise ConnectionError("another writer is at it") from error
            raise
        return True

    return _asked(uri, put)


def list_objects(uri: str) -> Iterator[StoredObject]:
    """Every object below `s3://bucket/prefix/`, in the order of its key."""
    bucket, prefix = _prefix(uri)
    for page in _pages(uri, Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):  # the folder markers of S3 consoles
                yield StoredObject(item["Key"].removeprefix(prefix), item["Size"], item["ETag"].strip('"'))


def list_names(uri: str) -> list[str]:
    """Names directly below `s3://bucket/prefix/`, those of deeper prefixes included, sorted."""
    bucket, prefix = _prefix(uri)
    names = set()
    for page in _pages(uri, Bucket=bucket, Prefix=prefix, Delimiter="/"):
        names |= {item["Key"].removeprefix(prefix) for item in page.get("Contents", [])}
        names |= {item["Prefix"].removeprefix(prefix).rstrip("/") for item in page.get("CommonPrefixes", [])}
    return sorted(names - {""})


def delete(uri: str, names: list[str] | None = None) -> None:
    """Delete an object, or the objects of these names below a prefix; what is not there is no error."""
    if names is None:
        bucket, key = split(uri)
        _asked(uri, partial(client().delete_object, Bucket=bucket, Key=key))
        return
    bucket, prefix = _prefix(uri)
    keys = [prefix + name for name in names]
    for start in range(0, len(keys), DELETE_KEYS):
        objects = [{"Key": key} for key in keys[start : start + DELETE_KEYS]]
        reply = _asked(uri, partial(client().delete_objects, Bucket=bucket, Delete={"Objects": objects}))
        if reply.get("Errors"):
            raise OSError(f"{uri}: not deleted: {reply['Errors'][0]}")


def open_stream(uri: str) -> BinaryIO:
    """An object, open for reading once from start to end in bounded memory, by one GET.

    Raises:
        OSError: while reading, when the object was replaced under a body that broke off.
    """
    return io.BufferedReader(_Stream(uri), 1 << 20)


def open_seekable(uri: str, size: int | None = None, start: int = 0) -> BinaryIO:
    """A seekable, buffered file over `size` bytes of an object from `start`; 4 MiB of it in memory at a time."""
    if size is None:
        size = read(uri, 0, 1)[1] - start
    return seekable(lambda at, count: read(uri, start + at, count)[0], size, uri)


def seekable(read_range: Callable[[int, int], bytes], size: int, name: str) -> BinaryIO:
    """A seekable, buffered file made of ranged reads (position, count) -> bytes."""
    return io.BufferedReader(_Ranges(read_range, size, name), RANGE_BYTES)


class _Stream(io.RawIOBase):
    """The body of one GET; where it breaks off, the rest of the same version is asked for."""

    def __init__(self, uri: str) -> None:
        self.name, self._position = uri, 0
        self._reply: dict[str, Any] | None = _asked(uri, lambda: _get(uri))
        self._etag: str = self._reply["ETag"]
        self._size = int(self._reply["ContentLength"])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: bytes = _asked(self.name, lambda: self._next(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _next(self, count: int) -> bytes:
        reply = self._reply or _get(self.name, self._position, IfMatch=self._etag)
        self._reply = reply
        try:
            data: bytes = reply["Body"].read(count)
            if not data and count and self._position < self._size:
                raise ConnectionError(f"{self._position} of {self._size} bytes arrived")
            return data
        except BODY_ERRORS:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._reply is not None:
            self._reply["Body"].close()
        self._reply = None


class _Ranges(io.RawIOBase):
    """A read-only file made of ranged reads."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int, name: str) -> None:
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


def _asked(uri: str, call: Callable[[], Any]) -> Any:
    """The answer to a request, a broken body asked for again; what goes wrong as an OSError."""
    try:
        return retry(call, lambda error: isinstance(error, BODY_ERRORS), BODY_ATTEMPTS)
    except botocore.exceptions.ClientError as error:
        raise _error(uri, error) from None
    except NO_ACCESS as error:
        raise PermissionError(f"{uri}: permission denied ({error}); {ACCESS}") from None
    except (botocore.exceptions.BotoCoreError, *BODY_ERRORS) as error:
        raise OSError(f"{uri}: {type(error).__name__}: {error}") from None


def _get(uri: str, start: int = 0, count: int | None = None, **extra: Any) -> Any:
    """The reply to a GET, or None for a range in an empty object or past the end of one."""
    bucket, key = split(uri)
    if start or count is not None:
        extra["Range"] = f"bytes={start}-" + ("" if count is None else str(start + count - 1))
    try:
        return client().get_object(Bucket=bucket, Key=key, **extra)
    except botocore.exceptions.ClientError as error:
        if _code(error) == "InvalidRange":
            return None
        raise


def _pages(uri: str, **request: Any) -> Iterator[dict[str, Any]]:
    pages = client().get_paginator("list_objects_v2").paginate(**request, PaginationConfig={"PageSize": PAGE_KEYS})
    try:
        yield from pages
    except botocore.exceptions.ClientError as error:
        raise _error(uri, error) from None
    except NO_ACCESS as error:
        raise PermissionError(f"{uri}: permission denied ({error}); {ACCESS}") from None
    except botocore.exceptions.BotoCoreError as error:
        raise OSError(f"{uri}: {error}; {ACCESS}") from None


def _prefix(uri: str) -> tuple[str, str]:
    bucket, key = split(uri)
    return bucket, key.rstrip("/") + "/" if key.rstrip("/") else ""


def _total_size(reply: dict[str, Any]) -> int:
    content_range = reply.get("ContentRange")
    return int(content_range.rpartition("/")[2]) if content_range else int(reply["ContentLength"])


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _error(uri: str, error: Exception) -> OSError:
    code = _code(error)
    if code == "NoSuchBucket":
        return FileNotFoundError(f"{uri}: no such bucket")
    if code in MISSING:
        return FileNotFoundError(f"{uri}: no such object")
    if code in DENIED:
        return PermissionError(f"{uri}: permission denied ({error})")
    return OSError(f"{uri}: {error}")
