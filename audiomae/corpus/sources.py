"""Where the bytes of a corpus file are: a local path, an S3 object, or a member of a tar shard on either."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from audiomae import s3
from audiomae.corpus.paths import is_s3, join, local_path, scheme_of
from audiomae.corpus.tars import Directory, read_directory, split_member
from audiomae.errors import DecodeError

WHOLE_BYTES = 16 << 20  # objects up to this size are read in one go, larger ones through ranged reads


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


def s3_read(uri: str, start: int = 0, count: int | None = None, limit: int | None = None) -> tuple[bytes, int]:
    """`s3.read` in the words of `DecodeError`."""
    try:
        return s3.read(uri, start, count, limit)
    except FileNotFoundError as error:
        raise DecodeError("open", str(error), "NotFound") from None
    except PermissionError as error:
        raise DecodeError("open", str(error), "PermissionDenied") from None
    except OSError as error:
        raise DecodeError("read", str(error), "ReadFailed") from None


def _open_s3(uri: str) -> bytes | BinaryIO:
    data, total = s3_read(uri, limit=WHOLE_BYTES)
    return data if total <= WHOLE_BYTES else open_s3_file(uri, total)


def _s3_exists(uri: str) -> bool:
    try:
        return s3.head(uri) is not None
    except OSError:
        return False


def open_s3_file(uri: str, size: int, start: int = 0) -> BinaryIO:
    """A seekable, buffered file over `size` bytes of an S3 object from `start`; 4 MiB of it in memory at a time."""
    return s3.seekable(lambda at, count: s3_read(uri, start + at, count)[0], size, uri)


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
    return s3.seekable(lambda at, count: read_range(tar, start + at, count), size, f"{tar}#{name}")
