"""Names, paths and URIs: how one is written as another."""

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def join(root: str, uri: str) -> str:
    """`uri` under `root`, or `uri` itself where it is absolute; a `file:` URI as the path it stands for."""
    if uri.startswith("file:/"):
        return file_uri_path(uri)
    if not root or uri.startswith("/") or scheme_of(uri):
        return uri
    return f"{root.rstrip('/')}/{uri}"


def scheme_of(uri: str) -> str:
    """`s3`, `http`, ... of an absolute URI, else an empty text."""
    found = SCHEME.match(uri)
    return found[1].lower() if found and uri.startswith("//", found.end() - 1) else ""


def file_uri_path(uri: str) -> str:
    """The local path of `file:///dir/s%20p.ogg`; one that is spelled without escapes is found as well."""
    raw = uri.removeprefix("file:")
    if raw.startswith("//"):
        host, slash, path = raw[2:].partition("/")
        raw = slash + path if host in ("", "localhost") else raw
    decoded = name_to_uri(unquote_to_bytes(raw))
    return raw if os.path.lexists(raw) and not os.path.lexists(local_path(decoded)) else decoded


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


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
