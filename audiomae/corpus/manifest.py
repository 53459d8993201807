"""What is in a corpus: any source -> a stream of Arrow tables, one row per audio file.

| source | rows |
|---|---|
| a folder, a glob, `s3://bucket/prefix`, one file | every file that may be audio, in the order of its uri |
| `.csv`, `.tsv`, `.jsonl`, `.parquet` with a `uri` column | its rows; relative uris lie beside the listing |
| `.tar`, a glob of `.tar`, a folder of `.tar` alone | WebDataset samples; `.json`, `.cls`, `.txt` become columns |

Columns: `uri` (corpus-relative), `size` in bytes (-1 if it cannot be read), `content_id` (S3 etag, or size and time of
change), `label` (first-level folder, where there are such folders), then whatever the source carries. All tables of a
corpus have one schema. Nothing here holds the whole listing: ten million files stream through in bounded memory.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from audiomae.corpus import folders, listings, webdataset
from audiomae.corpus.sources import is_s3, local_path, open_source
from audiomae.errors import UserError

__all__ = ["Corpus", "clip_id", "list_corpus", "open_source"]

LISTING_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"}
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
WILDCARDS = "*?["
SOURCE_KINDS = "a folder, a glob, s3://bucket/prefix, a .csv/.jsonl/.parquet with a 'uri' column, or .tar shards"


def clip_id(uri: str, start_s: float, window_s: float) -> int:
    """The stable id of a clip: 63 bits of BLAKE2b over its uri, start and window length in whole microseconds.

    Args:
        uri: corpus-relative.
        start_s: where the window starts in the file, in seconds.
        window_s: the configured window length in seconds; 0 stands for the whole file.
    """
    text = f"{uri}\0{round(start_s * 1e6)}\0{round(window_s * 1e6)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Corpus:
    """A listed source.

    Attributes:
        root: what relative uris are relative to: a folder or an `s3://` prefix.
        source: as the user gave it.
    """

    root: str
    source: str
    _tables: Callable[[], Iterator[pa.Table]]

    def batches(self) -> Iterator[pa.Table]:
        """The rows, a few thousand per table, all tables with one schema. Each call lists anew."""
        yield from (table for table in self._tables() if table.num_rows)


def list_corpus(src: str) -> Corpus:
    """Open a corpus for listing.

    Args:
        src: a folder, a glob, an `s3://` prefix, a listing file, or tar shards (see the module's table).

    Raises:
        UserError: the source does not exist, is empty, or is a listing that cannot be used.
    """
    src = os.fspath(src).removeprefix("file://")
    if not is_s3(src):
        src = str(Path(src).expanduser().absolute())
    corpus = _open(src)
    if next(corpus.batches(), None) is None:
        raise UserError(f"corpus {src!r} is empty: no file in it that may be audio; expected {SOURCE_KINDS}")
    return corpus


def _open(src: str) -> Corpus:
    if src.endswith(PACKED_TARS):
        raise UserError(f"corpus {src!r}: compressed tar files cannot be read in the middle; decompress them to .tar")
    is_glob = any(mark in src for mark in WILDCARDS) and (is_s3(src) or not os.path.lexists(local_path(src)))
    if is_glob:
        root = folders.glob_root(src)
        if src.endswith(".tar"):
            return Corpus(root, src, webdataset.tables(root, lambda: folders.tar_shards(root, src)))
        return Corpus(root, src, folders.tables(root, src))
    suffix = os.path.splitext(src)[1].lower()
    kind = folders.kind_of(src)
    if kind is None:
        raise UserError(f"corpus {src!r} does not exist; expected {SOURCE_KINDS}")
    if kind == "folder":
        if folders.only_tars(src):
            return Corpus(src, src, webdataset.tables(src, lambda: folders.tar_shards(src, None)))
        return Corpus(src.rstrip("/") or "/", src, folders.tables(src, None))
    root, _, name = src.rpartition("/")
    root = root or "/"
    if suffix in LISTING_SUFFIXES:
        return Corpus(root, src, listings.tables(root, src))
    if suffix == ".tar":
        return Corpus(root, src, webdataset.tables(root, lambda: iter([folders.entry_of(root, name)])))
    return Corpus(root, src, lambda: iter([folders.to_table([folders.entry_of(root, name)], labelled=False)]))
