"""WebDataset tar shards: members with one key are one sample; its sidecars become columns of its audio rows.

`000017.flac`, `000017.json`, `000017.cls` and `000017.txt` are the sample `000017`: the fields of the JSON object
become columns, `.cls` becomes `label` and `.txt` becomes `caption`, unless the JSON has those. A row's uri is
`shard.tar#member`; `tar_offset` is where the member's bytes begin, so that it is read without the shard's directory.
"""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from audiomae.corpus.folders import TABLE_ROWS, Entry, may_be_audio
from audiomae.corpus.listings import RESERVED, UniqueUris, rows_to_table, uniform
from audiomae.corpus.sources import join, read_range, tar_members
from audiomae.errors import DecodeError

SIDECARS = (".json", ".cls", ".txt")
SIDECAR_BYTES = 1 << 20


def tables(root: str, shards: Callable[[], Iterator[Entry]]) -> Callable[[], Iterator[pa.Table]]:
    """The samples of tar shards as manifest tables, as a function. A shard that is broken is itself a row, to fail."""
    rows = uniform(lambda: _tables(root, shards()))

    def stream() -> Iterator[pa.Table]:
        seen = UniqueUris(f"tar shards under {root}")
        yield from map(seen.check, rows())
        seen.close()

    return stream


def _tables(root: str, shards: Iterator[Entry]) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    for shard in shards:
        for row in _shard_rows(root, shard):
            rows.append(row)
            if len(rows) == TABLE_ROWS:
                yield rows_to_table(rows)
                rows = []
    if rows:
        yield rows_to_table(rows)


def _shard_rows(root: str, shard: Entry) -> Iterator[dict[str, Any]]:
    tar = join(root, shard.uri)
    try:
        for _, group in groupby(tar_members(tar), lambda member: _split(member[0])[0]):
            yield from _sample_rows(tar, shard, list(group))
    except DecodeError:
        yield {"uri": shard.uri, "size": shard.size, "content_id": shard.content_id, "tar_offset": None}


def _sample_rows(tar: str, shard: Entry, members: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    sidecars = {
        _split(name)[1]: read_range(tar, offset, size).decode("utf-8", "replace")
        for name, offset, size in members
        if _split(name)[1] in SIDECARS and size <= SIDECAR_BYTES
    }
    columns = _columns(sidecars)
    for name, offset, size in members:
        if may_be_audio(name):
            yield {
                "uri": f"{shard.uri}#{name}",
                "size": size,
                "content_id": f"{shard.content_id}-{offset}-{size}",
                "tar_offset": offset,
                **columns,
            }


def _split(name: str) -> tuple[str, str]:
    """(key, suffix): the key ends at the first dot of the base name, as WebDataset has it."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return folder + slash + key, (dot + suffix).lower()


def _columns(sidecars: dict[str, str]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if ".cls" in sidecars:
        columns["label"] = sidecars[".cls"].strip()
    if ".txt" in sidecars:
        columns["caption"] = sidecars[".txt"].strip()
    if ".json" in sidecars:
        try:
            fields = json.loads(sidecars[".json"])
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            fields = {"json": sidecars[".json"].strip()}
        taken = ("uri", "size", "content_id", "tar_offset", *RESERVED)
        columns.update({f"listing_{name}" if name in taken else name: value for name, value in fields.items()})
    return columns
