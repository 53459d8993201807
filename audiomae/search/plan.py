"""The plan of an embedding job: which work items there are, which shard commits them, what differs from last time.

A work item is one file, or one bounded segment of a long file. Items are sorted by uri and packed into shards of about
equal cost; the result is written once per generation as `manifest/items-*.parquet` (one row group per shard) and put
in force by creating `manifest/plan-NNNNNN.json` exclusively. An update never edits a plan: it writes the next
generation, in which untouched shards keep their names (and so their commits), and a shard that lost or renamed rows
gets a new name and a `base` shard from which its remaining rows are copied instead of being embedded again.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from audiomae.cli import UserError
from audiomae.config import StrictConfig
from audiomae.search.shards import (
    RESERVED_COLUMNS,
    EmbedSettings,
    new_attempt,
    read_latest_plan,
    read_receipts,
    read_shard,
    write_table,
)
from audiomae.storage import (
    IntegrityError,
    encode_json,
    put_if_absent,
    read_bytes,
    read_json,
    sha256_bytes,
    to_path,
    write_bytes,
)

OWN_COLUMNS = ("uri", "size", "content_id", "segment_start_s", "segment_end_s", "shard")
SHARDS_PER_FILE = 64
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
    """One shard of a plan: its items are row group `group` of `file`; `base` is the shard to copy rows from."""

    name: str
    file: str
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

    @property
    def num_items(self) -> int:
        return sum(shard.items for shard in self.shards)


class Difference(StrictConfig):
    """How a corpus listing differs from the manifest in force (lists of uris)."""

    new: list[str] = []
    changed: list[str] = []
    vanished: list[str] = []
    relabelled: list[str] = []
    columns: str = ""

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.vanished or self.relabelled or self.columns)

    def describe(self) -> str:
        """One line a person can act on."""
        kinds = {"new": self.new, "changed": self.changed, "vanished": self.vanished, "other columns": self.relabelled}
        parts = [f"{len(uris):,} {kind} (e.g. {uris[0]})" for kind, uris in kinds.items() if uris]
        return "; ".join(parts + ([self.columns] if self.columns else []))


def normalise_listing(batches: Iterator[pa.Table]) -> tuple[pa.Table, int]:
    """One Arrow table sorted by uri, columns that clash with ours renamed; and how many duplicate uris were dropped.

    Raises:
        UserError: when nothing was listed.
    """
    tables = list(batches)
    table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({"uri": []})
    if not table.num_rows:
        raise UserError("the corpus lists no audio files; check --corpus (a folder, glob, s3:// prefix or listing)")
    clashing = {*RESERVED_COLUMNS, *OWN_COLUMNS} - {"uri", "size", "content_id"}
    table = table.rename_columns([f"corpus_{name}" if name in clashing else name for name in table.column_names])
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
    windows = 1 + max(0, math.floor((duration_s - settings.window_s / 2) / settings.hop_s))
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
    sizes = items["size"].to_numpy(zero_copy_only=False).astype(np.float64)
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
    )
    return _publish(out, plan, items.append_column("shard", pa.array(names, pa.string())), {})


def updated_plan(
    out: str | UPath,
    plan: Plan,
    listing: pa.Table,
    probe: Probe,
    *,
    redo: Sequence[str] = (),
    encoder: str,
    corpus: str,
    root: str,
    shard_cost_s: float | None = None,
) -> Plan:
    """The next generation: new, changed and `redo` files go into new shards, everything else keeps its embeddings."""
    old = read_items(out, plan)
    diff = difference(old, listing)
    generation = plan.generation + 1
    todo = {*diff.new, *diff.changed, *redo}
    dropped = {*diff.changed, *diff.vanished, *redo}
    touched_uris = dropped | set(diff.relabelled) | (set(old["uri"].to_pylist()) if diff.columns else set())
    touched = _shards_of(old, touched_uris)

    kept = old.filter(pc.invert(pc.is_in(old["uri"], pa.array(sorted(dropped), pa.string()))))
    kept = _with_columns_of(listing, kept)
    renamed = {name: f"{generation:06d}-{number:06d}" for number, name in enumerate(sorted(touched))}
    shard = [renamed.get(name, name) for name in kept["shard"].to_pylist()]
    kept = kept.set_column(kept.column_names.index("shard"), "shard", pa.array(shard, pa.string()))

    fresh = listing.filter(pc.is_in(listing["uri"], pa.array(sorted(todo), pa.string())))
    tables = [kept]
    if fresh.num_rows:
        items = build_items(fresh, plan.settings, probe)
        names = [f"{generation:06d}-{len(renamed) + number:06d}" for number in pack(items, shard_cost_s)]
        tables.append(items.append_column("shard", pa.array(names, pa.string())))
    items = pa.concat_tables(tables, promote_options="permissive")

    committed = read_receipts(out, [entry.name for entry in plan.shards])
    bases = {entry.name: entry.name if entry.name in committed else entry.base for entry in plan.shards}
    copies = {renamed.get(name, name): base for name, base in bases.items() if base and base != renamed.get(name, name)}
    losing = {base for name in _shards_of(old, set(diff.vanished)) if (base := bases[name])}
    next_plan = plan.model_copy(
        update={
            "generation": generation,
            "encoder": encoder,
            "corpus": corpus,
            "corpus_root": root,
            "manifest_hash": manifest_hash(listing),
            "vanished": _write_vanished(out, plan, generation, sorted(losing), diff.vanished, listing),
        }
    )
    return _publish(out, next_plan, items, copies)


def load_plan(out: str | UPath) -> Plan | None:
    """The plan in force, or None when nothing was planned here."""
    value = read_latest_plan(out)
    return Plan(**value) if value is not None else None


def read_items(out: str | UPath, plan: Plan) -> pa.Table:
    """All work items of a plan, in shard order."""
    tables = []
    for file in plan.files:
        data = read_bytes(to_path(out) / file["name"])
        if (got := sha256_bytes(data)) != file["sha256"]:
            raise IntegrityError(
                f"{out}/{file['name']}: sha256 {got}, expected {file['sha256']} (its plan): the manifest was changed; "
                "restore it, or embed into a fresh folder"
            )
        tables.append(pq.read_table(pa.BufferReader(data)))
    return pa.concat_tables(tables)


def read_shard_items(out: str, entry: ShardEntry) -> pa.Table:
    """The work items of one shard (one row group)."""
    return _items_file(out, entry.file).read_row_group(entry.group)


@lru_cache(maxsize=4)
def _items_file(out: str, name: str) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(read_bytes(to_path(out) / name)))


def difference(items: pa.Table, listing: pa.Table) -> Difference:
    """What a fresh listing says against the items of the plan in force; content identity decides what changed."""
    items = items.sort_by("uri")
    first = np.ones(items.num_rows, bool)
    uris = items["uri"].combine_chunks()
    first[1:] = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1)).to_numpy(zero_copy_only=False)
    old = items.filter(pa.array(first))
    where = pc.index_in(listing["uri"], old["uri"].combine_chunks())
    common = listing.filter(pc.is_valid(where))
    match = old.take(where.drop_null())
    same_content = _equal(common["content_id"], match["content_id"])
    columns = [name for name in extra_columns(listing) if name in extra_columns(old)]
    same_columns = np.ones(common.num_rows, bool)
    for name in columns:
        same_columns &= _equal(common[name], match[name])
    added, removed = (
        sorted(set(extra_columns(a)) - set(extra_columns(b))) for a, b in ((listing, old), (old, listing))
    )
    notes = [f"columns added: {', '.join(added)}"] * bool(added) + [f"columns gone: {', '.join(removed)}"] * bool(
        removed
    )
    return Difference(
        new=listing.filter(pc.is_null(where))["uri"].to_pylist(),
        changed=common.filter(pa.array(~same_content))["uri"].to_pylist(),
        vanished=old.filter(pc.invert(pc.is_in(old["uri"], listing["uri"].combine_chunks())))["uri"].to_pylist(),
        relabelled=common.filter(pa.array(same_content & ~same_columns))["uri"].to_pylist(),
        columns="; ".join(notes),
    )


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    return np.fromiter((a == b for a, b in zip(left.to_pylist(), right.to_pylist(), strict=True)), bool, len(left))


def _shards_of(items: pa.Table, uris: set[str]) -> set[str]:
    mask = pc.is_in(items["uri"], pa.array(sorted(uris), pa.string()))
    return set(items.filter(mask)["shard"].to_pylist())


def _with_columns_of(listing: pa.Table, items: pa.Table) -> pa.Table:
    rows = listing.take(pc.index_in(items["uri"], listing["uri"].combine_chunks()))
    for name in ("segment_start_s", "segment_end_s", "shard"):
        rows = rows.append_column(name, items[name])
    return rows


def _write_vanished(
    out: str | UPath, plan: Plan, generation: int, shards: list[str], uris: list[str], listing: pa.Table
) -> dict[str, Any] | None:
    """All rows ever dropped because their file was gone, less those whose file is back."""
    columns = ["id", "uri", "start_s", "end_s"]
    tables = []
    if plan.vanished:
        earlier = pq.read_table(pa.BufferReader(read_bytes(to_path(out) / plan.vanished["name"])))
        tables.append(earlier.filter(pc.invert(pc.is_in(earlier["uri"], listing["uri"].combine_chunks()))))
    for receipt in read_receipts(out, shards).values():
        rows = read_shard(out, receipt, columns)
        tables.append(rows.filter(pc.is_in(rows["uri"], pa.array(uris, pa.string()))))
    if not tables:
        return None
    name = f"vanished/rows-{generation:06d}-{new_attempt()}.parquet"
    return {"name": name, "sha256": write_table(to_path(out) / name, pa.concat_tables(tables))}


def _publish(out: str | UPath, plan: Plan, items: pa.Table, copies: dict[str, str]) -> Plan:
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
            for group, (shard, first, count) in enumerate(spans):
                writer.write_table(items.slice(int(first), int(count)), row_group_size=int(count))
                base = copies.get(str(shard))
                entries.append(ShardEntry(name=str(shard), file=name, group=group, items=int(count), base=base))
        data = sink.getvalue().to_pybytes()
        write_bytes(to_path(out) / name, data)
        files.append({"name": name, "sha256": sha256_bytes(data), "rows": int(sum(count for _, _, count in spans))})
    plan = plan.model_copy(update={"files": files, "shards": entries})
    path = to_path(out) / "manifest" / f"plan-{plan.generation:06d}.json"
    put_if_absent(path, encode_json(plan.model_dump()))
    return Plan(**read_json(path))
