"""Folders, globs and S3 prefixes: every file that may be audio, streamed in the byte order of its uri."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, islice
from typing import Any, NamedTuple

import botocore.exceptions  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.corpus.notes import Notes
from audiomae.corpus.paths import is_s3, join, local_path, name_to_uri, scheme_of, split_s3
from audiomae.corpus.side_by_side import read_side_by_side
from audiomae.errors import UserError
from audiomae.s3 import ACCESS as S3_ACCESS
from audiomae.s3 import client as s3_client

TABLE_ROWS = 8192
SKIPPED = "files passed over by their names (hidden, a system's own, or no audio)"
S3_PAGE_KEYS = 1000
KEYS_A_FOLDER = 250
# fmt: off
NOT_AUDIO = frozenset(
    {
        ".md", ".rst", ".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml",
        ".html", ".htm", ".pdf", ".log", ".ini", ".cfg", ".py", ".sh", ".js", ".css", ".ipynb", ".parquet", ".arrow",
        ".feather", ".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".h5", ".hdf5", ".png", ".jpg", ".jpeg",
        ".gif", ".bmp", ".svg", ".webp", ".doc", ".docx", ".xls", ".xlsx", ".sha256", ".md5", ".lab", ".cls",
        ".textgrid", ".srt", ".vtt", ".cue", ".m3u", ".m3u8", ".tmp", ".part", ".crdownload",
    }
)
NOT_AUDIO_NAMES = frozenset(
    {
        "readme", "license", "licence", "licenses", "copying", "changelog", "makefile", "dockerfile", "_success",
    }
)
SYSTEM_NAMES = frozenset(
    {
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin",
        "recycler", "system volume information", "lost+found",
    }
)
"""Files and folders that operating systems leave behind; compared in lower case with every part of a name."""
AUDIO_SUFFIXES = frozenset(
    {
        ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".m4a", ".aac", ".3gp", ".amr", ".caf",
        ".webm", ".wma", ".mp4", ".aif", ".aiff", ".au", ".w64", ".rf64",
        ".dsf", ".dff", ".shn", ".loas", ".latm", ".ape", ".mpc", ".wv", ".tta", ".ac3", ".mka", ".mkv", ".ts",
    }
)
# fmt: on


class Entry(NamedTuple):
    """A file of a corpus: uri relative to its root, size in bytes (-1: unreadable), what its content is known by."""

    uri: str
    size: int
    content_id: str


def is_hidden(uri: str) -> bool:
    """Whether a part of a name is hidden (`.git/x.wav`, `._x.wav`) or a system's own (`__MACOSX/x`, `Thumbs.db`)."""
    parts = uri.lower().split("/")
    return not SYSTEM_NAMES.isdisjoint(parts) or any(part[:1] == "." and part not in (".", "..") for part in parts)


def may_be_audio(uri: str) -> bool:
    """False for hidden and system files, and for names that say they are something else (LICENSES.md, cover.png)."""
    stem, suffix = os.path.splitext(uri.rpartition("/")[2].lower())
    return suffix not in NOT_AUDIO and (bool(suffix) or stem not in NOT_AUDIO_NAMES) and not is_hidden(uri)


def tables(root: str, pattern: str | None) -> Callable[[Notes], Iterator[pa.Table]]:
    """The listing of a folder or prefix, optionally only what matches a glob, as a function that starts it afresh."""

    @cache
    def labelled() -> bool:
        return _has_folders(root)

    def stream(notes: Notes) -> Iterator[pa.Table]:
        entries = _audio(_matching(root, pattern), notes)
        while rows := list(islice(entries, TABLE_ROWS)):
            yield to_table(rows, labelled())

    return stream


def _audio(entries: Iterator[Entry], notes: Notes) -> Iterator[Entry]:
    for entry in entries:
        if may_be_audio(entry.uri):
            yield entry
        else:
            notes.add(SKIPPED, entry.uri)


def to_table(entries: list[Entry], labelled: bool) -> pa.Table:
    """Entries as a manifest table; `labelled` adds the first folder of each uri as its label."""
    columns: dict[str, pa.Array] = {
        "uri": pa.array([entry.uri for entry in entries], pa.string()),
        "size": pa.array([entry.size for entry in entries], pa.int64()),
        "content_id": pa.array([entry.content_id for entry in entries], pa.string()),
    }
    if labelled:
        columns["label"] = pa.array([_first_folder(entry.uri) for entry in entries], pa.string())
    return pa.table(columns)


def kind_of(src: str) -> str | None:
    """ "file", "folder", or `None` when there is nothing there."""
    if is_s3(src):
        bucket, key = split_s3(src)
        if key and not key.endswith("/") and _is_object(bucket, key):
            return "file"
        return "folder" if next(_list_s3(src), None) is not None else None
    path = local_path(src)
    if path.is_dir():
        return "folder"
    return "file" if os.path.lexists(path) else None


def entry_of(root: str, uri: str) -> Entry:
    """Size and content id of one file, looked up."""
    full = join(root, uri)
    if is_s3(full):
        try:
            head = _s3_head(*split_s3(full))
        except PermissionError:
            return Entry(uri, -1, "unreadable-403")
        return Entry(uri, -1, "missing") if head is None else Entry(uri, head["ContentLength"], head["ETag"].strip('"'))
    return _local_entry(uri, os.fspath(local_path(full)))


def glob_root(pattern: str) -> str:
    """The folder of a glob: everything before the first component with a wildcard that no folder is called by."""
    parts = pattern.split("/")
    wild = [index for index, part in enumerate(parts) if any(mark in part for mark in "*?[")]
    for index in wild:
        if is_s3(pattern) or index == len(parts) - 1 or not local_path("/".join(parts[: index + 1])).is_dir():
            return "/".join(parts[:index]) or "/"
    return "/".join(parts[: wild[-1]]) or "/"


def tar_shards(root: str, pattern: str | None, notes: Notes) -> Iterator[Entry]:
    """The `.tar` files of a folder or glob."""
    return (entry for entry in _audio(_matching(root, pattern), notes) if entry.uri.lower().endswith(".tar"))


def only_tars(src: str) -> bool:
    """Whether what lies directly in a folder is tar shards and nothing else that may be audio."""
    names = [name for name in islice(_top_names(src), 1000) if name.endswith("/") or may_be_audio(name)]
    return bool(names) and all(name.lower().endswith(".tar") for name in names)


def _matching(root: str, pattern: str | None) -> Iterator[Entry]:
    entries = _list_s3(root) if is_s3(root) else _walk(os.fspath(local_path(root)), "", ())
    if pattern is None:
        return entries
    matches = _translate(pattern[len(root.rstrip("/")) + 1 :]).fullmatch
    return (entry for entry in entries if matches(entry.uri))


def _translate(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: `**/` any folders, `*` and `?` within one name, `[abc]`, `[!abc]`."""
    out, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            out, at = out + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] in "*?":
            out, at = out + ("[^/]*" if pattern[at] == "*" else "[^/]"), at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out, at = out + ("[^" + inside[1:] if inside[0] == "!" else "[" + inside) + "]", end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return re.compile(out, re.DOTALL)


def _first_folder(uri: str) -> str | None:
    head, separator, _ = uri.partition("/")
    return head if separator else None


def _has_folders(root: str) -> bool:
    return any(name.endswith("/") for name in _top_names(root))


def _top_names(root: str) -> Iterator[str]:
    """What lies directly under a root, folders with a closing slash; of an S3 prefix the first 20,000."""
    if not is_s3(root):
        with os.scandir(local_path(root)) as found:
            for item in found:
                if not is_hidden(item.name):
                    yield item.name + ("/" if _is_dir(item) else "")
        return
    bucket, prefix = _s3_prefix(root)
    for page in islice(_pages(root, Bucket=bucket, Prefix=prefix, Delimiter="/"), 20):
        yield from (item["Prefix"].removeprefix(prefix) for item in page.get("CommonPrefixes", []))
        yield from (item["Key"].removeprefix(prefix) for item in page.get("Contents", []))


# --- local ------------------------------------------------------------------------------------------------------------


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Files below `folder` in byte order of their uris. What cannot be entered is a row, to fail with its reason."""
    try:
        status = os.stat(folder)
        names = _sorted_names(folder)
    except OSError as error:
        yield Entry(prefix, -1, f"unreadable-{error.errno}")
        return
    here = (status.st_dev, status.st_ino)
    if here in above:  # a symbolic link back up
        return
    empty = True
    for name in names:
        empty = False
        path = os.path.join(folder, os.fsdecode(name))
        uri = prefix + name_to_uri(name)
        if name.endswith(b"/"):
            if is_hidden(name_to_uri(name)):
                continue
            yield from _walk(path, uri, (*above, here))
        else:
            yield _local_entry(uri, path)
    if empty and os.path.splitext(prefix.rstrip("/"))[1].lower() in AUDIO_SUFFIXES:
        yield Entry(prefix, -1, "directory")  # an empty folder named like a sound: the user meant a file


def _sorted_names(folder: str) -> Iterator[bytes]:
    """Names in a folder, folders with a closing slash, sorted; held as Arrow bytes, not as Python objects."""
    chunks: list[pa.Array] = []
    with os.scandir(folder) as found:
        names = (os.fsencode(item.name) + (b"/" if _is_dir(item) else b"") for item in found)
        while some := list(islice(names, 1 << 16)):
            chunks.append(pa.array(some, pa.large_binary()))
    column = pa.chunked_array(chunks, pa.large_binary())
    order = pc.sort_indices(column)

    def stream() -> Iterator[bytes]:
        for start in range(0, len(order), TABLE_ROWS):
            yield from column.take(order[start : start + TABLE_ROWS]).to_pylist()

    return stream()


def _is_dir(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a symbolic link that leads to itself
        return False


def _local_entry(uri: str, path: str) -> Entry:
    try:
        status = os.stat(path)
    except OSError as error:
        return Entry(uri, -1, f"unreadable-{error.errno}")
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Entry(uri, size, f"{status.st_size}-{status.st_mtime_ns}")


# --- S3 ---------------------------------------------------------------------------------------------------------------


def _s3_prefix(uri: str) -> tuple[str, str]:
    bucket, key = split_s3(uri)
    return bucket, key.rstrip("/") + "/" if key.rstrip("/") else ""


def _pages(uri: str, **request: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from (
            s3_client()
            .get_paginator("list_objects_v2")
            .paginate(**request, PaginationConfig={"PageSize": S3_PAGE_KEYS})
        )
    except botocore.exceptions.ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchBucket":
            raise UserError(f"corpus {uri!r}: no such bucket") from None
        raise UserError(f"corpus {uri!r} cannot be listed: {error}") from None
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"corpus {uri!r} cannot be listed: {error}; {S3_ACCESS}") from None


def _list_s3(uri: str) -> Iterator[Entry]:
    """Objects below a prefix in the order of their keys.

    The first page tells how the keys are laid out: where its folders are large, the others are listed side by side.
    """
    bucket, prefix = _s3_prefix(uri)
    first = next(_pages(uri, Bucket=bucket, Prefix=prefix), {})
    names = [item["Key"].removeprefix(prefix) for item in first.get("Contents", [])]
    folders = {name.partition("/")[0] for name in names if "/" in name}
    large = bool(folders) and len(names) >= KEYS_A_FOLDER * S3_PAGE_KEYS // 1000 * len(folders)
    if not first.get("IsTruncated"):
        pages: Iterator[dict[str, Any]] = iter([first])
    elif large:
        pages = read_side_by_side(_s3_units(uri, bucket, prefix), lambda unit: _unit_pages(uri, bucket, unit))
    else:
        rest = _pages(uri, Bucket=bucket, Prefix=prefix, StartAfter=first["Contents"][-1]["Key"])
        pages = chain([first], rest)
    for page in pages:
        for item in page.get("Contents", []):
            name = item["Key"].removeprefix(prefix)
            if not name.endswith("/"):  # those are the folder markers of S3 consoles
                if name.startswith("/") or scheme_of(name) or name.startswith("file:/"):  # relative, it would not be
                    name = f"s3://{bucket}/{item['Key']}"
                yield Entry(name, item["Size"], item["ETag"].strip('"'))


def _s3_units(uri: str, bucket: str, prefix: str) -> Iterator[dict[str, Any] | str]:
    """What lies directly below a prefix, in the order of keys: objects (each as a page) and folders (their prefix)."""
    for page in _pages(uri, Bucket=bucket, Prefix=prefix, Delimiter="/"):
        found: list[tuple[bytes, dict[str, Any] | str]] = [
            (item["Key"].encode(), {"Contents": [item]}) for item in page.get("Contents", [])
        ]
        found += [(item["Prefix"].encode(), item["Prefix"]) for item in page.get("CommonPrefixes", [])]
        yield from (unit for _, unit in sorted(found, key=lambda pair: pair[0]))


def _unit_pages(uri: str, bucket: str, unit: dict[str, Any] | str) -> Iterator[dict[str, Any]]:
    return _pages(uri, Bucket=bucket, Prefix=unit) if isinstance(unit, str) else iter([unit])


def _s3_head(bucket: str, key: str) -> dict[str, Any] | None:
    try:
        head: dict[str, Any] = s3_client().head_object(Bucket=bucket, Key=key)
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in ("404", "NoSuchKey", "NotFound", "NoSuchBucket"):
            return None
        if code in ("403", "AccessDenied", "Forbidden"):
            raise PermissionError(f"s3://{bucket}/{key}: {error}") from None
        raise UserError(f"corpus s3://{bucket}/{key} cannot be listed: {error}") from None
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"corpus s3://{bucket}/{key} cannot be listed: {error}; {S3_ACCESS}") from None
    return head


def _is_object(bucket: str, key: str) -> bool:
    try:
        return _s3_head(bucket, key) is not None
    except PermissionError:  # a user who may only list gets 403 for a key that is not there
        return False
