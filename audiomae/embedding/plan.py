"""The plan of an embedding job: which work items there are, which shard commits them, what differs from last time.

A work item is one file, or one bounded segment of a long file. Items are sorted by uri and packed into shards of about
equal cost; the result is written once per generation as `manifest/items-*.parquet` (one row group per shard) and put
in force by creating `manifest/plan-NNNNNN.json` exclusively. `update.py` writes the next generations.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from audiomae.artifacts.embeddings import new_attempt, plans, read_latest_plan
from audiomae.artifacts.receipts import FileEntry, Receipt, entry_of, read_file
from audiomae.artifacts.tables import EmbedSettings, read_parquet
from audiomae.config import StrictConfig
from audiomae.corpus.columns import own_names
from audiomae.errors import UserError
from audiomae.storage import read_bytes, sha256_bytes, to_path, write_bytes

OWN_COLUMNS = ("uri", "size", "content_id", "segment_start_s", "segment_end_s", "shard")
SHARDS_PER_FILE = 64
FIX_ITEMS = "restore it, or embed into a fresh folder"
TARGET_SHARDS = 256
SHARD_COST_S = (300.0, 1800.0)
SEGMENT_S = 1800.0
PROBE_ABOVE_BYTES = 8 << 20
ITEM_OVERHEAD_S = 1.0
# seconds of audio per byte, a guess that only balances shards
BYTES_PER_S = {"wav": 64_000, "flac": 50_000, "aif": 64_000, "aiff": 64_000, "mp3": 16_000, "amr": 1_600}
BYTES_PER_S_DEFAULT = 14_000

Probe = Callable[[list[str]], list[float | None]]


class ShardEntry(StrictConfig):
    """One shard of a plan: its items are row group `group` of `file`; `base` is the shard to copy rows from.

    Plans of older versions have no `file_sha256`.
    """

    name: str
    file: str
    file_sha256: str | None = None
    group: int
    items: int
    base: str | None = None


class Plan(StrictConfig):
    """`manifest/plan-NNNNNN.json`."""

    generation: int
    settings: EmbedSettings
    encoder: str
    corpus: str
    corpus_root: str
    manifest_hash: str
    files: list[dict[str, Any]]
    shards: list[ShardEntry]
    vanished: dict[str, Any] | None = None
    windowing: str | None = None

    @property
    def num_items(self) -> int:
        return sum(shard.items for shard in self.shards)

    @property
    def receipt(self) -> Receipt:
        """The items files with their checksums."""
        return Receipt({file["name"]: FileEntry(file["sha256"], file.get("bytes")) for file in self.files})


def normalise_listing(batches: Iterator[pa.Table]) -> tuple[pa.Table, int]:
    """One Arrow table sorted by uri, columns that clash with ours renamed; and how many duplicate uris were dropped.

    Raises:
        UserError: when nothing was listed.
    """
    tables = list(batches)
    table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({"uri": []})
    if not table.num_rows:
        raise UserError("the corpus lists no audio files; check --corpus (a folder, glob, s3:// prefix or listing)")
    names = own_names(table.column_names, keep=("uri", "size", "content_id", "tar_offset"))
    table = table.rename_columns([names[name] for name in table.column_names])
    table = table.sort_by("uri").combine_chunks()
    uris = table["uri"]
    first = np.ones(table.num_rows, bool)
    first[1:] = pc.not_equal(uris.slice(1), uris.slice(0, table.num_rows - 1)).to_numpy(zero_copy_only=False)
    return table.filter(pa.array(first)), int((~first).sum())


def extra_columns(items: pa.Table) -> list[str]:
    """The corpus' own columns (label, fold, ...), which every embedding row carries."""
    return [name for name in items.column_names if name not in OWN_COLUMNS]


def manifest_hash(listing: pa.Table) -> str:
    """SHA-256 over uri, content identity and the corpus' own columns of every file, in uri order."""
    columns = ["uri", "content_id", *extra_columns(listing)]
    digest = hashlib.sha256("\x1f".join(columns).encode())
    for batch in listing.select(columns).to_batches(max_chunksize=65_536):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(repr(row).encode())
    return digest.hexdigest()


def build_items(listing: pa.Table, settings: EmbedSettings, probe: Probe) -> pa.Table:
    """Turn listed files into work items: long files are cut into segments that start on a window boundary.

    Only files above 8 MiB are probed for their duration; a file that cannot be probed stays one item (and fails with
    its reason when it is decoded). With one vector per file there are no segments: windows stream into their mean.
    """
    rows = np.arange(listing.num_rows)
    starts: np.ndarray = np.full(listing.num_rows, np.nan)
    ends = starts.copy()
    if settings.mode == "windows":
        sizes = listing["size"].to_numpy(zero_copy_only=False)
        large = np.flatnonzero(sizes > PROBE_ABOVE_BYTES)
        durations = probe(listing["uri"].take(pa.array(large)).to_pylist()) if len(large) else []
        cuts = {
            int(row): segments(duration, settings) for row, duration in zip(large, durations, strict=True) if duration
        }
        counts = np.array([len(cuts.get(row, ())) or 1 for row in range(listing.num_rows)])
        rows = np.repeat(rows, counts)
        starts, ends = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        for row, spans in cuts.items():
            for position, span in enumerate(spans, start=int(offsets[row])):
                starts[position], ends[position] = span
    table = listing.take(pa.array(rows))
    table = table.append_column("segment_start_s", pa.array(starts, from_pandas=True))
    return table.append_column("segment_end_s", pa.array(ends, from_pandas=True))


def segments(duration_s: float, settings: EmbedSettings) -> list[tuple[float, float]]:
    """Spans of about half an hour, each a whole number of windows; `[]` when one item is enough.

    A span holds the windows that start in `[start, end)`; the last one has no end, so that a wrong declared duration
    loses nothing.
    """
    per_segment = max(1, int(SEGMENT_S / settings.hop_s))
    windows = 1 + max(0, math.floor((duration_s - settings.window_s) / settings.hop_s))
    if windows <= per_segment * 1.5:
        return []
    firsts = range(0, windows, per_segment)
    bounds = [(first * settings.hop_s, (first + per_segment) * settings.hop_s) for first in firsts]
    return [*bounds[:-1], (bounds[-1][0], math.inf)]


def pack(items: pa.Table, shard_cost_s: float | None = None) -> np.ndarray:
    """Assign consecutive items to shards of about equal cost: `int64[N]`, ascending from 0.

    The cost of an item is its guessed audio seconds plus an overhead; the target is a 256th of the whole, but no less
    than 5 minutes (a commit must cost nothing) and no more than 30 (so must a lost shard).
    """
    sizes = np.maximum(items["size"].to_numpy(zero_copy_only=False), 0).astype(np.float64)
    extensions = pc.utf8_lower(pc.replace_substring_regex(items["uri"], r"^.*\.", ""))
    encoded = extensions.combine_chunks().dictionary_encode()
    rates = np.array(
        [BYTES_PER_S.get(name, BYTES_PER_S_DEFAULT) for name in encoded.dictionary.to_pylist()], np.float64
    )
    cost = sizes / rates[encoded.indices.to_numpy(zero_copy_only=False)]
    spans = np.subtract(*(items[f"segment_{side}_s"].to_numpy(zero_copy_only=False) for side in ("end", "start")))
    spans = np.where(np.isinf(spans), SEGMENT_S, spans)
    cost = np.where(np.isnan(spans), cost, spans) + ITEM_OVERHEAD_S
    target = shard_cost_s or float(np.clip(cost.sum() / TARGET_SHARDS, *SHARD_COST_S))
    number = ((np.cumsum(cost) - cost / 2) / target).astype(np.int64)
    return np.unique(number, return_inverse=True)[1]


def new_plan(
    out: str | UPath,
    listing: pa.Table,
    settings: EmbedSettings,
    probe: Probe,
    *,
    encoder: str,
    corpus: str,
    root: str,
    shard_cost_s: float | None = None,
    windowing: str | None = None,
) -> Plan:
    """Plan a first run and put it in force (or return the one that another driver put in force first)."""
    items = build_items(listing, settings, probe)
    names = [f"000000-{number:06d}" for number in pack(items, shard_cost_s)]
    plan = Plan(
        generation=0,
        settings=settings,
        encoder=encoder,
        corpus=corpus,
        corpus_root=root,
        manifest_hash=manifest_hash(listing),
        files=[],
        shards=[],
        windowing=windowing,
    )
    return publish_plan(out, plan, items.append_column("shard", pa.array(names, pa.string())), {})


def load_plan(out: str | UPath) -> Plan | None:
    """The plan in force, or None when nothing was planned here."""
    value = read_latest_plan(out)
    return Plan(**value) if value is not None else None


def read_items(out: str | UPath, plan: Plan) -> pa.Table:
    """All work items of a plan, in shard order."""
    receipt = plan.receipt
    return pa.concat_tables([read_parquet(read_file(out, name, receipt, FIX_ITEMS)) for name in receipt.files])


def read_shard_items(out: str, entry: ShardEntry) -> pa.Table:
    """The work items of one shard (one row group)."""
    return _items_file(out, entry.file, entry.file_sha256).read_row_group(entry.group)


@lru_cache(maxsize=4)
def _items_file(out: str, name: str, sha256: str | None) -> pq.ParquetFile:
    receipt = Receipt({name: FileEntry(sha256)}) if sha256 else None
    data = read_file(out, name, receipt, FIX_ITEMS) if receipt else read_bytes(to_path(out) / name)
    return pq.ParquetFile(pa.BufferReader(data))


def publish_plan(out: str | UPath, plan: Plan, items: pa.Table, copies: dict[str, str]) -> Plan:
    """Write the items, then create the plan file exclusively; the plan of whoever was first is returned."""
    items = items.sort_by([("shard", "ascending"), ("uri", "ascending"), ("segment_start_s", "ascending")])
    names, firsts, counts = np.unique(
        items["shard"].to_numpy(zero_copy_only=False), return_index=True, return_counts=True
    )
    files: list[dict[str, Any]] = []
    entries: list[ShardEntry] = []
    attempt = new_attempt()
    for start in range(0, len(names), SHARDS_PER_FILE):
        name = f"manifest/items-{plan.generation:06d}-{len(files):05d}-{attempt}.parquet"
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, items.schema, compression="zstd") as writer:
            spans = list(zip(names, firsts, counts, strict=True))[start : start + SHARDS_PER_FILE]
            for _, first, count in spans:
                writer.write_table(items.slice(int(first), int(count)), row_group_size=int(count))
        data = sink.getvalue().to_pybytes()
        write_bytes(to_path(out) / name, data)
        entry = ShardEntry(name="", file=name, file_sha256=sha256_bytes(data), group=0, items=0)
        for group, (shard, _, count) in enumerate(spans):
            own = {"name": str(shard), "group": group, "items": int(count), "base": copies.get(str(shard))}
            entries.append(entry.model_copy(update=own))
        files.append({"name": name, "rows": int(sum(count for _, _, count in spans)), **asdict(entry_of(data))})
    plan = plan.model_copy(update={"files": files, "shards": entries})
    plans(out).create(plan.generation, plan.model_dump())
    return Plan(**plans(out).read(plan.generation))
