"""Taking over a corpus that changed: what differs, the next generation of the plan, and copying what stays.

An update never edits a plan. In the next generation untouched shards keep their names, and so their commits; a shard
that lost or relabelled rows gets a new name and a `base` shard, from which `copy_shard` takes the vectors it keeps; new
and changed files go into new shards. Rows of files that are gone are written to `vanished/`.
"""

from collections.abc import Sequence
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
    new_attempt,
    read_failures,
    read_receipt,
    read_receipts,
    read_shard,
    read_silent,
    write_table,
)
from audiomae.artifacts.receipts import FileEntry, Receipt, read_file
from audiomae.artifacts.tables import DECODE_NOTE, embedding_schema, read_parquet
from audiomae.config import StrictConfig
from audiomae.embedding.plan import (
    Plan,
    Probe,
    ShardEntry,
    build_items,
    extra_columns,
    manifest_hash,
    pack,
    publish_plan,
    read_items,
    read_shard_items,
)
from audiomae.errors import IntegrityError
from audiomae.storage import to_path


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
        kinds = {"new": self.new, "changed": self.changed, "vanished": self.vanished}
        kinds["with other columns"] = self.relabelled
        parts = [f"{len(uris):,} {kind} (e.g. {uris[0]})" for kind, uris in kinds.items() if uris]
        return "; ".join(parts + ([self.columns] if self.columns else []))


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
    return publish_plan(out, next_plan, items, copies)


def copy_shard(out: str, plan: Plan, entry: ShardEntry) -> bool:
    """Commit a shard whose vectors its base shard already has, with the corpus columns of the plan in force.

    Raises:
        IntegrityError: when the base shard is gone, or has neither a row nor a failure for one of the items.
    """
    items = read_shard_items(out, entry)
    try:
        base = read_receipt(out, entry.base or "")
    except FileNotFoundError:
        raise IntegrityError(
            f"{out}/commits/{entry.base}.json: expected as the base of shard {entry.name}, not found"
        ) from None
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
        receipt = Receipt({plan.vanished["name"]: FileEntry(plan.vanished["sha256"])})
        earlier = read_parquet(read_file(out, plan.vanished["name"], receipt, FIX_RUN))
        tables.append(earlier.filter(pc.invert(pc.is_in(earlier["uri"], listing["uri"].combine_chunks()))))
    for losing in read_receipts(out, shards).values():
        rows = read_shard(out, losing, columns)
        tables.append(rows.filter(pc.is_in(rows["uri"], pa.array(uris, pa.string()))))
    if not tables:
        return None
    name = f"vanished/rows-{generation:06d}-{new_attempt()}.parquet"
    return {"name": name, "sha256": write_table(to_path(out) / name, pa.concat_tables(tables))}
