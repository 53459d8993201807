"""Taking over a corpus that changed: what differs, the next generation of the plan, and copying what stays.

An update never edits a plan. In the next generation untouched shards keep their names, and so their commits; a shard
that lost or relabelled rows gets a new name and a `base` shard, from which `copy_shard` takes the vectors it keeps; new
and changed files go into new shards. Rows of files that are gone are written to `vanished/`.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from audiomae.artifacts.embeddings import (
    FIX_RUN,
    ShardOrigin,
    ShardTables,
    commit_shard,
    committed_shards,
    new_attempt,
    read_failures,
    read_receipt,
    read_receipts,
    read_shard,
    read_silent,
    receipt_path,
    write_table,
)
from audiomae.artifacts.receipts import FileEntry, Receipt, read_file
from audiomae.artifacts.tables import DECODE_NOTE, embedding_schema, read_parquet
from audiomae.config import StrictConfig
from audiomae.embedding.listing import Listing, ManifestHash
from audiomae.embedding.plan import (
    Packer,
    Plan,
    PlanRequest,
    PlanWriter,
    Probe,
    ShardEntry,
    build_items,
    extra_columns,
    hashed_columns,
    iter_items,
    planned_listing,
    read_shard_items,
)
from audiomae.errors import IntegrityError
from audiomae.storage import to_path


class CorpusDifference(StrictConfig):
    """How a corpus listing differs from the manifest in force (lists of uris), and what is to be tried again."""

    new: list[str] = []
    changed: list[str] = []
    vanished: list[str] = []
    relabelled: list[str] = []
    columns: str = ""
    failed: list[str] = []

    def __bool__(self) -> bool:
        return any(bool(value) for _, value in self)

    def describe(self) -> str:
        """One line a person can act on."""
        kinds = {"new": self.new, "changed": self.changed, "vanished": self.vanished}
        kinds |= {"with other columns": self.relabelled, "that failed before": self.failed}
        parts = [f"{len(uris):,} {kind} (e.g. {uris[0]})" for kind, uris in kinds.items() if uris]
        return "; ".join(parts + ([self.columns] if self.columns else []))


def difference(out: str | UPath, plan: Plan, listing: Listing) -> CorpusDifference:
    """What a fresh listing says against the items of the plan in force; content identity decides what changed.

    Both go by in the order of their uris, a partition at a time.
    """
    planned = planned_listing(out, plan)
    parts: list[CorpusDifference] = []
    bounds: list[str | None] = [None]
    waiting: pa.Table | None = None
    for table in listing.partitions():
        if waiting is not None:
            bounds.append(table["uri"][0].as_py())
            parts.append(_difference(planned.between(bounds[-2], bounds[-1]), waiting))
        waiting = table
    assert waiting is not None  # a listing has rows
    parts.append(_difference(planned.between(bounds[-1], None), waiting))
    names = ("new", "changed", "vanished", "relabelled")
    lists = {name: [uri for part in parts for uri in getattr(part, name)] for name in names}
    added, removed = (
        sorted(set(extra_columns(one.schema.empty_table())) - set(extra_columns(other.schema.empty_table())))
        for one, other in ((listing, planned), (planned, listing))
    )
    notes = [f"columns added: {', '.join(added)}"] if added else []
    notes += [f"columns gone: {', '.join(removed)}"] if removed else []
    return CorpusDifference(**lists, columns="; ".join(notes))


def _difference(old: pa.Table, listing: pa.Table) -> CorpusDifference:
    """Of one partition, but for columns that came or went."""
    where = pc.index_in(listing["uri"], old["uri"].combine_chunks())
    common = listing.filter(pc.is_valid(where))
    match = old.take(where.drop_null())
    same_content = _equal(common["content_id"], match["content_id"])
    same_columns = np.ones(common.num_rows, bool)
    for name in extra_columns(listing):
        if name in old.column_names:
            same_columns &= _equal(common[name], match[name])
    return CorpusDifference(
        new=listing.filter(pc.is_null(where))["uri"].to_pylist(),
        changed=common.filter(pa.array(~same_content))["uri"].to_pylist(),
        vanished=old.filter(pc.invert(pc.is_in(old["uri"], listing["uri"].combine_chunks())))["uri"].to_pylist(),
        relabelled=common.filter(pa.array(same_content & ~same_columns))["uri"].to_pylist(),
    )


def updated_plan(
    out: str | UPath,
    plan: Plan,
    listing: Listing,
    probe: Probe,
    request: PlanRequest,
    diff: CorpusDifference,
) -> Plan:
    """The next generation: new, changed and failed files go into new shards, everything else keeps its embeddings.

    Shards that keep all their rows stay in the items files they are in: what is written is in proportion to the change.
    """
    generation = plan.generation + 1
    todo = pa.array(sorted({*diff.new, *diff.changed, *diff.failed}), pa.string())
    dropped = pa.array(sorted({*diff.changed, *diff.vanished, *diff.failed}), pa.string())
    touched = _shards_of(out, plan, pa.array(sorted({*dropped.to_pylist(), *diff.relabelled}), pa.string()))
    losing = _shards_of(out, plan, pa.array(sorted(diff.vanished), pa.string()))
    if diff.columns:
        touched = {entry.name for entry in plan.shards}

    committed = committed_shards(out)
    bases = {entry.name: entry.name if entry.name in committed else entry.base for entry in plan.shards}
    changing = [entry for entry in plan.shards if entry.name in touched]
    writer = PlanWriter(out, generation)
    for number, entry in enumerate(changing):
        items = read_shard_items(str(out), entry)
        items = items.filter(pc.invert(pc.is_in(items["uri"], dropped)))
        if items.num_rows:
            shards = np.full(items.num_rows, number)
            writer.write(_with_columns_of(listing, items), shards, {number: bases[entry.name]})

    manifest, packer = ManifestHash(), Packer(request.shard_cost_s)
    for part in listing.partitions():
        manifest.update(hashed_columns(part))
        fresh = part.filter(pc.is_in(part["uri"], todo))
        if fresh.num_rows:
            for items, shards in packer.add(build_items(fresh, plan.settings, probe)):
                writer.write(items, shards + len(changing))
    for items, shards in packer.finish():
        writer.write(items, shards + len(changing))
    next_plan = plan.model_copy(
        update={
            "generation": generation,
            "encoder": request.encoder,
            "corpus": request.corpus,
            "corpus_root": request.root,
            "manifest_hash": manifest.hexdigest(),
            "vanished": _write_vanished(
                out,
                plan,
                generation,
                sorted({base for name in losing if (base := bases[name])}),
                diff.vanished,
                listing,
            ),
        }
    )
    return writer.publish(next_plan, [entry for entry in plan.shards if entry.name not in touched])


def copy_shard(out: str, plan: Plan, entry: ShardEntry) -> bool:
    """Commit a shard whose vectors its base shard already has, with the corpus columns of the plan in force.

    Raises:
        IntegrityError: when the base shard is gone, or has neither a row nor a failure for one of the items.
    """
    items, name = read_shard_items(out, entry), entry.base or ""
    try:
        base = read_receipt(out, name)
    except FileNotFoundError:
        path = receipt_path(out, name)
        raise IntegrityError(f"{path}: expected as the base of shard {entry.name}, not found") from None
    tables = read_shard(out, base), read_failures(out, base), read_silent(out, base)
    rows, failures, silent = (table.filter(pc.is_in(table["uri"], items["uri"].combine_chunks())) for table in tables)
    missing = set(items["uri"].to_pylist()) - set(rows["uri"].to_pylist()) - set(failures["uri"].to_pylist())
    if missing:
        raise IntegrityError(
            f"{out}: shard {entry.base} has neither rows nor failures for {len(missing)} files of {entry.name}, e.g. "
            f"{min(missing)}: embed again into a fresh folder"
        )
    extra = [items.schema.field(name) for name in extra_columns(items)]
    where = pc.index_in(rows["uri"], items["uri"].combine_chunks())
    columns = [rows[name] for name in ("id", "uri", "start_s", "end_s", "embedding")]
    columns += [items[field.name].take(where) for field in extra]
    table = pa.Table.from_arrays(columns, schema=embedding_schema(plan.settings, extra))
    if DECODE_NOTE in rows.column_names:
        table = table.append_column(DECODE_NOTE, rows[DECODE_NOTE])
    origin = ShardOrigin(
        inputs=entry.items,
        audio_s=base.audio_s * table.num_rows / max(1, base.rows),
        fingerprint=plan.settings.fingerprint,
        manifest=plan.manifest_hash,
    )
    return commit_shard(out, entry.name, ShardTables(table, failures, silent), origin)


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> np.ndarray:
    """Row by row; missing equals missing, and NaN equals NaN."""
    if left.type != right.type or pa.types.is_nested(left.type):
        return np.fromiter((a == b for a, b in zip(left.to_pylist(), right.to_pylist(), strict=True)), bool, len(left))
    same = pc.fill_null(pc.equal(left, right), False)
    missing = [pc.is_null(column, nan_is_null=pa.types.is_floating(left.type)) for column in (left, right)]
    return pc.or_(same, pc.and_(*missing)).to_numpy(zero_copy_only=False)


def _shards_of(out: str | UPath, plan: Plan, uris: pa.Array) -> set[str]:
    """The shards that hold items of these files."""
    found: set[str] = set()
    if len(uris):
        for items in iter_items(out, plan, ["uri", "shard"]):
            found.update(items.filter(pc.is_in(items["uri"], uris))["shard"].unique().to_pylist())
    return found


def _with_columns_of(listing: Listing, items: pa.Table) -> pa.Table:
    listed = listing.rows_of(items["uri"])
    rows = listed.take(pc.index_in(items["uri"], listed["uri"].combine_chunks()))
    for name in ("segment_start_s", "segment_end_s"):
        rows = rows.append_column(name, items[name])
    return rows


def _write_vanished(
    out: str | UPath, plan: Plan, generation: int, shards: list[str], uris: list[str], listing: Listing
) -> dict[str, Any] | None:
    """All rows ever dropped because their file was gone, less those whose file is back."""
    columns = ["id", "uri", "start_s", "end_s"]
    tables = []
    if plan.vanished:
        receipt = Receipt({plan.vanished["name"]: FileEntry(plan.vanished["sha256"])})
        earlier = read_parquet(read_file(out, plan.vanished["name"], receipt, FIX_RUN))
        back = listing.rows_of(earlier["uri"])["uri"].combine_chunks()
        tables.append(earlier.filter(pc.invert(pc.is_in(earlier["uri"], back))))
    for losing in read_receipts(out, shards).values():
        rows = read_shard(out, losing, columns)
        tables.append(rows.filter(pc.is_in(rows["uri"], pa.array(uris, pa.string()))))
    if not tables:
        return None
    name = f"vanished/rows-{generation:06d}-{new_attempt()}.parquet"
    return {"name": name, "sha256": write_table(to_path(out) / name, pa.concat_tables(tables))}
