"""The receipts of many shards in one file, so that 10^5 of them are read with a few requests.

`commits/<shard>.json` stays what says that a shard is done: it is created exclusively, and found by listing. A segment,
`commits/receipts-<sha256>.parquet`, holds copies of receipts, each with what the listing said of it when it was copied
(its ETag, or size and time of change). Where the listing says something else now, or a segment is damaged or gone, the
receipt itself is read: nothing is lost with a segment but time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from audiomae.artifacts import receipts
from audiomae.artifacts.tables import map_ahead, parquet_bytes, read_parquet
from audiomae.errors import IntegrityError
from audiomae.storage import list_identities, read_bytes, remove, sha256_bytes, to_path, write_bytes

COMMITS = "commits"
PREFIX, SUFFIX = "receipts-", ".parquet"
LEAST = 256  # receipts worth a segment
MOST_SEGMENTS = 8  # before they become one
READ_AHEAD = 16
SCHEMA = pa.schema([("shard", pa.string()), ("identity", pa.string()), ("receipt", pa.binary())])


@dataclass(frozen=True)
class Commits:
    """What one listing of `commits/` says.

    Attributes:
        folder: `DIR/commits`.
        identities: shard -> ETag, or size and time of change, of its receipt.
        segments: names of segments.
    """

    folder: UPath
    identities: Mapping[str, str]
    segments: Collection[str]

    @classmethod
    def list(cls, out: str | UPath) -> "Commits":
        """List the receipts of an embedding folder."""
        folder = to_path(out) / COMMITS
        found = list_identities(folder)
        identities = {name.removesuffix(".json"): said for name, said in found.items() if name.endswith(".json")}
        return cls(folder, identities, [name for name in found if is_segment(name)])

    def copies(self, shards: Collection[str]) -> dict[str, bytes]:
        """The receipts of those of `shards` that segments have; none where the shards are fewer than the segments."""
        if len(shards) < len(self.segments):
            return {}
        wanted = pa.array(shards, pa.string())
        found: dict[str, bytes] = {}
        for table in map_ahead(partial(_read_segment, self.folder), self.segments):
            current = self._current(table)
            current = current.filter(pc.is_in(current["shard"], wanted))
            found.update(zip(current["shard"].to_pylist(), current["receipt"].to_pylist(), strict=True))
        return found

    def compact(self, unsealed: Collection[str] = (), least: int = LEAST) -> int:
        """Copy the receipts that no segment has into a new one, if they are many; how many. Damaged ones are left.

        Args:
            unsealed: as of `receipts.read_sealed`.
            least: so many make a segment.
        """
        tables = [self._current(table) for table in map_ahead(partial(_read_segment, self.folder), self.segments)]
        copied = {shard for table in tables for shard in table["shard"].to_pylist()}
        missing = [shard for shard in self.identities if shard not in copied]
        if len(missing) < least:
            return 0
        said = [self.identities[shard] for shard in missing]
        texts = list(map_ahead(partial(_read_whole, self.folder, unsealed), missing, ahead=READ_AHEAD))
        fresh = pa.table([missing, said, texts], schema=SCHEMA)
        fresh = fresh.filter(pc.is_valid(fresh["receipt"]))
        merged = len(self.segments) >= MOST_SEGMENTS
        data = parquet_bytes(pa.concat_tables([*tables, fresh]) if merged else fresh)
        name = f"{PREFIX}{sha256_bytes(data)}{SUFFIX}"
        write_bytes(self.folder / name, data)
        for old in self.segments if merged else ():
            if old != name:
                remove(self.folder / old)
        return fresh.num_rows

    def _current(self, table: pa.Table) -> pa.Table:
        """The rows of a segment that are what the listing says."""
        keep = [
            self.identities.get(shard) == said
            for shard, said in zip(table["shard"].to_pylist(), table["identity"].to_pylist(), strict=True)
        ]
        return table.filter(pa.array(keep, pa.bool_()))


def is_segment(name: str) -> bool:
    """Whether a file in `commits/` is a segment."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


def _read_segment(folder: UPath, name: str) -> pa.Table:
    """A segment; nothing when it is damaged, or was merged into another meanwhile."""
    try:
        data = read_bytes(folder / name)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    whole = name == f"{PREFIX}{sha256_bytes(data)}{SUFFIX}"
    return read_parquet(data).cast(SCHEMA) if whole else SCHEMA.empty_table()


def _read_whole(folder: UPath, unsealed: Collection[str], shard: str) -> bytes | None:
    """The bytes of a receipt; None when it is damaged or was withdrawn."""
    path = folder / f"{shard}.json"
    try:
        data = read_bytes(path)
        receipts.unseal(path, data, unsealed)
    except (FileNotFoundError, IntegrityError):
        return None
    return data
