"""The plan of an embedding job: which work items there are, which shard commits them, what differs from last time.

A work item is one file, or one bounded segment of a long file. Items are sorted by uri and packed into shards of about
equal cost; the result is written once per generation as `manifest/items-*.parquet` (one row group per shard) and put
in force by creating `manifest/plan-NNNNNN.json` exclusively. `update.py` writes the next generations.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from audiomae.artifacts.embeddings import fold_shards, new_attempt, plans, read_latest_plan, unfold_shards
from audiomae.artifacts.receipts import FileEntry, Receipt, entry_of, read_file
from audiomae.artifacts.tables import EmbedSettings
from audiomae.config import StrictConfig
from audiomae.corpus.columns import RESERVED
from audiomae.embedding.listing import Listing, ManifestHash
from audiomae.storage import read_bytes, sha256_bytes, to_path, write_bytes

OWN_COLUMNS = ("uri", "size", "content_id", "segment_start_s", "segment_end_s", "shard")
SHARDS_PER_FILE = 64
FIX_ITEMS = "restore it, or embed into a fresh folder"
TARGET_SHARDS = 256
SHARD_COST_S = (60.0, 1800.0)
SEGMENT_S = 1800.0
PROBE_ABOVE_BYTES = 8 << 20
ITEM_OVERHEAD_S = 1.0
SUFFIX_LENGTH = 5
WRITE_THREADS = 4
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


def extra_columns(items: pa.Table) -> list[str]:
    """The corpus' own columns (label, fold, ...), which every embedding row carries."""
    return [name for name in items.column_names if name not in OWN_COLUMNS]


def hashed_columns(listing: pa.Table) -> pa.Table:
    """What the manifest hash covers: uri, content identity and the corpus' own columns."""
    return listing.select(["uri", "content_id", *extra_columns(listing)])


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
        counts = np.ones(listing.num_rows, np.int64)
        for row, spans in cuts.items():
            counts[row] = len(spans) or 1
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


def costs(items: pa.Table) -> np.ndarray:
    """float64[N]: guessed audio seconds of each item plus an overhead."""
    sizes = np.maximum(items["size"].to_numpy(zero_copy_only=False), 0).astype(np.float64)
    ends = pc.utf8_lower(pc.utf8_slice_codeunits(items["uri"].combine_chunks(), start=-SUFFIX_LENGTH, stop=None))
    encoded = pc.dictionary_encode(ends)
    rates = np.array([_bytes_per_s(end) for end in encoded.dictionary.to_pylist()], np.float64)
    cost = sizes / rates[encoded.indices.to_numpy(zero_copy_only=False)]
    spans = np.subtract(*(items[f"segment_{side}_s"].to_numpy(zero_copy_only=False) for side in ("end", "start")))
    spans = np.where(np.isinf(spans), SEGMENT_S, spans)
    return np.where(np.isnan(spans), cost, spans) + ITEM_OVERHEAD_S


def _bytes_per_s(end: str) -> float:
    return BYTES_PER_S.get(end.rpartition(".")[2], BYTES_PER_S_DEFAULT)


class Packer:
    """Assigns consecutive items to shards of about equal cost, however they are cut into tables.

    The target is a 256th of the whole, but no less than 1 minute (a commit must cost little, and two workers that share
    400 short files must end together) and no more than 30 (a lost shard must cost little, too). Tables are held back
    until the target is known: at the end, or once it cannot be less than 30.
    """

    def __init__(self, shard_cost_s: float | None = None) -> None:
        self._target = shard_cost_s
        self._held: list[tuple[pa.Table, np.ndarray]] = []
        self._total = 0.0
        self._cost, self._number, self._shard = 0.0, -1, -1

    def add(self, items: pa.Table) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(items, int64[N] shard numbers ascending from 0) of what can be told by now."""
        cost = costs(items)
        self._held.append((items, cost))
        self._total += float(cost.sum())
        if self._target is None and self._total >= TARGET_SHARDS * SHARD_COST_S[1]:
            self._target = SHARD_COST_S[1]
        if self._target is not None:
            yield from self._release(self._target)

    def finish(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """What was held back."""
        yield from self._release(self._target or float(np.clip(self._total / TARGET_SHARDS, *SHARD_COST_S)))

    def _release(self, target: float) -> Iterator[tuple[pa.Table, np.ndarray]]:
        held, self._held = self._held, []
        for items, cost in held:
            reached = self._cost + np.cumsum(cost)
            number = ((reached - cost / 2) / target).astype(np.int64)
            steps = np.diff(number, prepend=self._number) > 0
            shards = self._shard + np.cumsum(steps)
            self._cost, self._number, self._shard = float(reached[-1]), int(number[-1]), int(shards[-1])
            yield items, shards


class PlanRequest(NamedTuple):
    """What a plan is made for, in the words of whoever asked for it.

    Attributes:
        encoder, corpus: as given to the job.
        root: what the uris of the listing are relative to.
        shard_cost_s: how many seconds of audio a shard holds; None = as suits their number.
        windowing: why the windows are as long as they are.
    """

    encoder: str
    corpus: str
    root: str
    shard_cost_s: float | None = None
    windowing: str | None = None


def new_plan(
    out: str | UPath,
    listing: Listing,
    settings: EmbedSettings,
    probe: Probe,
    request: PlanRequest,
) -> Plan:
    """Plan a first run and put it in force (or return the one that another driver put in force first)."""
    writer = PlanWriter(out, 0)
    packer = Packer(request.shard_cost_s)
    manifest = ManifestHash()
    for part in listing.partitions():
        manifest.update(hashed_columns(part))
        for items, shards in packer.add(build_items(part, settings, probe)):
            writer.write(items, shards)
    for items, shards in packer.finish():
        writer.write(items, shards)
    plan = Plan(
        generation=0,
        settings=settings,
        encoder=request.encoder,
        corpus=request.corpus,
        corpus_root=request.root,
        manifest_hash=manifest.hexdigest(),
        files=[],
        shards=[],
        windowing=request.windowing,
    )
    return writer.publish(plan)


def load_plan(out: str | UPath) -> Plan | None:
    """The plan in force, or None when nothing was planned here."""
    value = read_latest_plan(out)
    return Plan(**value) if value is not None else None


def iter_items(out: str | UPath, plan: Plan, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The work items of a plan, in shard order, an items file at a time."""
    receipt = plan.receipt
    groups: dict[str, list[int]] = {name: [] for name in receipt.files}
    for entry in plan.shards:
        groups[entry.file].append(entry.group)
    for name, wanted in groups.items():
        data = pa.BufferReader(read_file(out, name, receipt, FIX_ITEMS))
        file = pq.ParquetFile(data)
        yield file.read(columns) if len(wanted) == file.num_row_groups else file.read_row_groups(wanted, columns)


def read_items(out: str | UPath, plan: Plan) -> pa.Table:
    """All work items of a plan, in shard order."""
    return pa.concat_tables(iter_items(out, plan), promote_options="permissive")


def planned_listing(out: str | UPath, plan: Plan) -> Listing:
    """The files of a plan as the listing they came from."""
    names = ("segment_start_s", "segment_end_s", "shard")
    tables = iter_items(out, plan)
    return Listing((table.drop_columns(names) for table in tables), keep=RESERVED)


def read_shard_items(out: str, entry: ShardEntry) -> pa.Table:
    """The work items of one shard (one row group). Safe to call from several threads."""
    with _items_lock:  # Arrow's reader of a file is for one thread at a time: two end the process
        return _items_file(out, entry.file, entry.file_sha256).read_row_group(entry.group, use_threads=False)


_items_lock = threading.Lock()


@lru_cache(maxsize=4)
def _items_file(out: str, name: str, sha256: str | None) -> pq.ParquetFile:
    receipt = Receipt({name: FileEntry(sha256)}) if sha256 else None
    data = read_file(out, name, receipt, FIX_ITEMS) if receipt else read_bytes(to_path(out) / name)
    return pq.ParquetFile(pa.BufferReader(data))


class PlanWriter:
    """Writes the items of new shards, in order, to items files of `SHARDS_PER_FILE` row groups, a few at once.

    Args:
        out: the embedding folder.
        generation: of the plan; shards are called after it.
        first: number of the first shard.
    """

    def __init__(self, out: str | UPath, generation: int, first: int = 0) -> None:
        self._out, self._generation, self._first = to_path(out), generation, first
        self._attempt = new_attempt()
        self._waiting: list[tuple[pa.Table, np.ndarray]] = []
        self._pool = ThreadPoolExecutor(WRITE_THREADS)
        self._written: list[Future[tuple[dict[str, Any], list[ShardEntry]]]] = []
        self._bases: dict[int, str | None] = {}

    def write(self, items: pa.Table, shards: np.ndarray, bases: Mapping[int, str | None] | None = None) -> None:
        """Append items, with the number of the shard of each (ascending, going on where the last call ended).

        Args:
            items: sorted by uri and start within a shard.
            shards: int64[N].
            bases: shards whose rows are copied from another one.
        """
        self._bases |= bases or {}
        while len(items):
            file = int(shards[0]) // SHARDS_PER_FILE
            if self._waiting and int(self._waiting[0][1][0]) // SHARDS_PER_FILE != file:
                self._flush()
            count = int(np.searchsorted(shards, (file + 1) * SHARDS_PER_FILE))
            self._waiting.append((items.slice(0, count), shards[:count]))
            items, shards = items.slice(count), shards[count:]

    def publish(self, plan: Plan, kept: Sequence[ShardEntry] = ()) -> Plan:
        """Create the plan file exclusively, with what was written and the `kept` shards; the plan of whoever was first
        is returned."""
        if self._waiting:
            self._flush()
        self._pool.shutdown()
        before = {file["name"]: file for file in plan.files}
        files = [before[name] for name in dict.fromkeys(entry.file for entry in kept)]
        entries = list(kept)
        for done in self._written:
            file, own = done.result()
            files.append(file)
            entries += own
        plan = plan.model_copy(update={"files": files, "shards": entries})
        plans(self._out).create(plan.generation, fold_shards(plan.model_dump()))
        return Plan(**unfold_shards(plans(self._out).read(plan.generation)))

    def _flush(self) -> None:
        if len(self._written) >= WRITE_THREADS:  # no more than that many files wait in memory
            self._written[-WRITE_THREADS].result()
        number = len(self._written)
        name = f"manifest/items-{self._generation:06d}-{number:05d}-{self._attempt}.parquet"
        self._written.append(self._pool.submit(self._write_file, name, self._waiting))
        self._waiting = []

    def _write_file(
        self, name: str, parts: list[tuple[pa.Table, np.ndarray]]
    ) -> tuple[dict[str, Any], list[ShardEntry]]:
        items = pa.concat_tables([table for table, _ in parts])
        numbers, firsts = np.unique(np.concatenate([shards for _, shards in parts]), return_index=True)
        counts = np.diff(firsts, append=items.num_rows)
        names = [f"{self._generation:06d}-{self._first + number:06d}" for number in numbers]
        column = pa.array(np.repeat(np.arange(len(names)), counts))
        items = items.append_column("shard", pa.array(names, pa.string()).take(column)).combine_chunks()
        sink = pa.BufferOutputStream()
        # row groups are small: a dictionary, statistics and zstd for each page would cost three times the rest
        with pq.ParquetWriter(
            sink, items.schema, compression="snappy", use_dictionary=["shard"], write_statistics=False
        ) as writer:
            for first, count in zip(firsts, counts, strict=True):
                writer.write_table(items.slice(int(first), int(count)), row_group_size=int(count))
        data = sink.getvalue().to_pybytes()
        write_bytes(self._out / name, data)
        entry = ShardEntry(name="", file=name, file_sha256=sha256_bytes(data), group=0, items=0)
        entries = [
            entry.model_copy(
                update={"name": shard, "group": group, "items": int(count), "base": self._bases.get(int(number))}
            )
            for group, (shard, number, count) in enumerate(zip(names, numbers, counts, strict=True))
        ]
        return {"name": name, "rows": items.num_rows, **asdict(entry_of(data))}, entries
