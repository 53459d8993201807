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
from itertools import chain
from pathlib import Path

import pyarrow as pa

from audiomae.corpus import folders, listings, webdataset
from audiomae.corpus.columns import check_declared, declare
from audiomae.corpus.likeness import Likeness
from audiomae.corpus.notes import Notes
from audiomae.corpus.paths import file_uri_path, is_s3
from audiomae.corpus.read_as import ReadAs
from audiomae.corpus.sources import open_source
from audiomae.errors import ListingError, UserError

__all__ = ["Corpus", "ReadAs", "clip_id", "list_corpus", "open_source"]

LISTING_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"}
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
WILDCARDS = "*?["
SOURCE_KINDS = "a folder, a glob, s3://bucket/prefix, a .csv/.jsonl/.parquet with a 'uri' column, or .tar shards"

Stream = Callable[[Notes], Iterator[pa.Table]]


def clip_id(uri: str, start_s: float, window_s: float) -> int:
    """The stable id of a clip: 63 bits of BLAKE2b over its uri, start and window length in whole microseconds.

    Args:
        uri: corpus-relative.
        start_s: where the window starts in the file, in seconds.
        window_s: the configured window length in seconds; 0 stands for the whole file.
    """
    text = f"{uri}\0{round(start_s * 1e6)}\0{round(window_s * 1e6)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Corpus:
    """A listed source.

    Attributes:
        root: what relative uris are relative to: a folder or an `s3://` prefix.
        source: as the user gave it.
        notes: what there is to say of the rows that `batches` has given: what was passed over, kept as text, paired
            with nothing, spelled in two ways.
    """

    def __init__(self, root: str, source: str, stream: Stream) -> None:
        self.root, self.source, self.notes = root, source, Notes()
        self._stream = stream
        self._begun: Iterator[pa.Table] | None = None

    def batches(self) -> Iterator[pa.Table]:
        """The rows, a few thousand per table, all tables with one schema. Each call lists anew.

        Raises:
            UserError: the listing cannot be used, or (at its end) names a uri twice.
        """
        begun, self._begun = self._begun, None
        return begun if begun is not None else self._list()

    def is_empty(self) -> bool:
        """Whether there is no row; what was listed to find that out is what `batches` gives next."""
        tables = self._list()
        first = next(tables, None)
        if first is not None:
            self._begun = chain([first], tables)
        return first is None

    def _list(self) -> Iterator[pa.Table]:
        self.notes.clear()
        likeness = Likeness(self.source, self.root, self.notes)
        for table in self._stream(self.notes):
            if table.num_rows:
                likeness.look(table)
                yield table
        if likeness.repeated():
            again = (table["uri"].to_pylist() for table in self._stream(Notes()))
            likeness.refuse_repeated(chain.from_iterable(again))
        likeness.close()


def list_corpus(src: str, read_as: ReadAs | None = None) -> Corpus:
    """Open a corpus for listing.

    Args:
        src: a folder, a glob, an `s3://` prefix, a listing file, or tar shards (see the module's table).
        read_as: types of columns, and words for "missing" in a CSV, where the default is not meant.

    Raises:
        UserError: the source does not exist, is empty, or is a listing that cannot be used.
        ConfigError: a type is declared for a column that is not there.
    """
    src = os.fspath(src)
    if src.startswith("file:/"):
        src = file_uri_path(src)
    if not is_s3(src):
        src = str(Path(src).expanduser().absolute())
    corpus = _open(src, read_as or ReadAs())
    if corpus.is_empty():
        raise UserError(f"corpus {src!r} is empty: no file in it that may be audio; expected {SOURCE_KINDS}")
    return corpus


def _open(src: str, read_as: ReadAs) -> Corpus:
    if src.endswith(PACKED_TARS):
        raise UserError(f"corpus {src!r}: compressed tar files cannot be read in the middle; decompress them to .tar")
    kind = folders.kind_of(src)
    if kind is None and any(mark in src for mark in WILDCARDS):
        root = folders.glob_root(src)
        if src.lower().endswith(".tar"):
            return _tars(root, src, src, read_as)
        return _files(root, src, src, read_as)
    if kind is None:
        raise UserError(f"corpus {src!r} does not exist; expected {SOURCE_KINDS}")
    if kind == "folder":
        if folders.only_tars(src):
            return _tars(src, src, None, read_as)
        return _files(src.rstrip("/") or "/", src, None, read_as)
    root, _, name = src.rpartition("/")
    root = root or "/"
    suffix = os.path.splitext(src)[1].lower()
    if suffix in LISTING_SUFFIXES:
        return Corpus(root, src, listings.tables(root, src, read_as))
    if suffix == ".tar":
        return Corpus(root, src, webdataset.tables(root, lambda _: iter([folders.entry_of(root, name)]), read_as))
    if suffix in PACKED and os.path.splitext(src[: -len(suffix)])[1].lower() in LISTING_SUFFIXES:
        raise ListingError(f"corpus {src!r}: a compressed listing; decompress it first")
    if suffix in folders.NOT_AUDIO:
        raise UserError(f"corpus {src!r}: {suffix} is neither audio nor a listing; expected {SOURCE_KINDS}")
    return Corpus(root, src, lambda _: iter([folders.to_table([folders.entry_of(root, name)], labelled=False)]))


def _tars(root: str, src: str, pattern: str | None, read_as: ReadAs) -> Corpus:
    return Corpus(root, src, webdataset.tables(root, lambda notes: folders.tar_shards(root, pattern, notes), read_as))


def _files(root: str, src: str, pattern: str | None, read_as: ReadAs) -> Corpus:
    list_tables = folders.tables(root, pattern)

    def stream(notes: Notes) -> Iterator[pa.Table]:
        for table in list_tables(notes):
            check_declared(src, read_as.types, table.column_names)
            yield declare(src, table, read_as.types)

    return Corpus(root, src, stream)
