"""Embedding shards on disk or S3: how they are committed, read, verified and cleaned up.

```
DIR/run.json                        who made this: encoder, fingerprint, dim, windowing, corpus, counts
DIR/manifest/plan-000000.json       the plan in force (the highest number); names its items files and shards
DIR/manifest/items-*.parquet        the work items, one row group per shard
DIR/embeddings/<shard>-<attempt>.parquet
DIR/failures/<shard>-<attempt>.parquet   inputs without an embedding (failed), lost spans of others (damaged)
DIR/silent/<shard>-<attempt>.parquet     windows that were left out because nothing can be heard in them
DIR/commits/<shard>.json            the receipt; it is written last and *is* the done-marker
DIR/commits/receipts-*.parquet      copies of many receipts, to read them at once (`receipt_segments.py`)
DIR/vanished/*.parquet              rows of files that a later `--update` no longer found
```

Several processes may embed the same shard (a retry, a second driver, a worker that outlived its driver): each writes
files under its own attempt name, and the receipt is created exclusively, so exactly one attempt counts. Readers trust
receipts alone; `collect_garbage` removes what no receipt names once every shard of the plan is committed.
"""

import functools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError
from upath import UPath

from audiomae.artifacts import receipts
from audiomae.artifacts.receipt_segments import Commits, is_segment
from audiomae.artifacts.receipts import FileEntry, Numbered, entry_of
from audiomae.artifacts.tables import (
    DAMAGED,
    FAILURE_SCHEMA,
    RESERVED_COLUMNS,
    SILENT_SCHEMA,
    EmbedSettings,
    column_to_vectors,
    embedding_schema,
    map_ahead,
    parquet_bytes,
    read_parquet,
    with_kind,
)
from audiomae.config import StrictConfig
from audiomae.errors import IntegrityError
from audiomae.storage import below, exists, list_names, remove, sha256_bytes, to_path, write_bytes

EMBEDDINGS, FAILURES, SILENT = "embeddings", "failures", "silent"
FIX_SHARD = "restore it, or delete the shard's commits/*.json and relaunch the embed_corpus job to embed it again"
PRECISION_FILE = "precision.json"
FIX_RUN = "relaunch the embed_corpus job that wrote it"
# the keys of what older versions wrote without a seal
# fmt: off
UNSEALED_PLAN = frozenset({
    "generation", "settings", "encoder", "corpus", "corpus_root", "manifest_hash", "files", "shards", "vanished",
})
UNSEALED_RECEIPT = frozenset({
    "shard", "attempt", "inputs", "rows", "failed", "audio_s", "embeddings", "sha256", "bytes", "failures",
    "failures_sha256", "fingerprint", "manifest",
})
UNSEALED_RUN = frozenset({
    "fingerprint", "dim", "sample_rate", "mode", "window_s", "hop_s", "vector_dtype", "status", "encoder", "corpus",
    "corpus_root", "manifest_hash", "generation", "config", "inputs", "embedded", "failed", "rows", "last_run",
})
# fmt: on


@dataclass(frozen=True)
class ShardTables:
    """What embedding one shard gives: rows, the reasons of what failed or was damaged, windows left out as silent."""

    embeddings: pa.Table
    failures: pa.Table = field(default_factory=FAILURE_SCHEMA.empty_table)
    silent: pa.Table = field(default_factory=SILENT_SCHEMA.empty_table)

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """rows; failed (inputs without an embedding); damaged (embedded files that lost a span); silent (windows)."""
        pairs = zip(self.failures["kind"].to_pylist(), self.failures["uri"].to_pylist(), strict=True)
        damaged = [uri for kind, uri in pairs if kind == DAMAGED]
        return {
            "rows": self.embeddings.num_rows,
            "failed": self.failures.num_rows - len(damaged),
            "damaged": len(set(damaged)),
            "silent": self.silent.num_rows,
        }


class ShardOrigin(StrictConfig):
    """What a shard was made from: how many inputs and seconds of audio, by which encoder, of which manifest.

    `precision` is that of the encoder's arithmetic, `float32` or `bfloat16`; None where it was not recorded yet.
    """

    inputs: int
    audio_s: float
    fingerprint: str
    manifest: str
    precision: str | None = None


class ShardReceipt(ShardOrigin):
    """The commit of one shard (`commits/<shard>.json`).

    Attributes:
        inputs: work items: files, or bounded segments of long files; those embedded and those failed.
        rows: windows (or whole files) embedded.
        failed: inputs that gave no embedding.
        damaged: files that were embedded but for a lost span.
        silent: windows left out because nothing can be heard in them.
        files: every file of the shard, by name below DIR.
    """

    shard: str
    attempt: str
    rows: int
    failed: int
    damaged: int = 0
    silent: int = 0
    files: dict[str, FileEntry]

    @property
    def embeddings(self) -> str:
        """The name of the embedding table below DIR."""
        return next(name for name in self.files if name.startswith(f"{EMBEDDINGS}/"))

    @property
    def sha256(self) -> str:
        """Of the embedding table: what the shard is known by."""
        return self.files[self.embeddings].sha256

    def table_name(self, kind: str) -> str | None:
        """The name of the `failures` or `silent` table below DIR; None when the shard has no such row."""
        return next((name for name in self.files if name.startswith(f"{kind}/")), None)


def new_attempt() -> str:
    """A name no other attempt has."""
    return uuid.uuid4().hex[:12]


def commit_shard(out: str | UPath, shard: str, tables: ShardTables, origin: ShardOrigin) -> bool:
    """Write the tables of one shard, then its receipt; of several attempts exactly one returns `True`.

    The loser removes what it wrote. An empty `failures` or `silent` table is not written.
    """
    attempt = new_attempt()
    named = {EMBEDDINGS: tables.embeddings, FAILURES: tables.failures, SILENT: tables.silent}
    files = {}
    for kind, table in named.items():
        if kind == EMBEDDINGS or table.num_rows:
            name, data = f"{kind}/{shard}-{attempt}.parquet", parquet_bytes(table)
            write_bytes(below(out, name), data)
            files[name] = entry_of(data)
    facts = {"shard": shard, "attempt": attempt, **tables.counts, **origin.model_dump()}
    facts["audio_s"] = round(origin.audio_s, 6)
    if receipts.create(receipt_path(out, shard), receipts.Receipt(files, facts)):
        return True
    for name in files:
        remove(below(out, name))
    return False


def agree_on_precision(out: str | UPath, wanted: str) -> str:
    """The precision of everything that is embedded into `out`: `wanted`, unless another one was settled before.

    The first worker settles it for all, whatever machines they run on: `DIR/precision.json`, created exclusively.
    """
    path = to_path(out) / PRECISION_FILE
    if receipts.create_exclusively(path, receipts.seal({"precision": wanted})):
        return wanted
    return str(receipts.read_sealed(path, frozenset(), FIX_RUN)["precision"])


def settled_precision(out: str | UPath) -> str | None:
    """What `agree_on_precision` settled for this folder; None when nothing was embedded into it yet."""
    try:
        return str(receipts.read_sealed(to_path(out) / PRECISION_FILE, frozenset(), FIX_RUN)["precision"])
    except FileNotFoundError:
        return None


def joined_precision(precisions: Iterable[str | None]) -> str | None:
    """One name for what several shards or sets were embedded in: `float32`, `bfloat16+float32`; None if unrecorded."""
    return "+".join(sorted({precision for precision in precisions if precision})) or None


def receipt_path(out: str | UPath, shard: str) -> str:
    """Where the receipt of a shard lies."""
    return below(out, f"commits/{shard}.json")


def is_committed(out: str | UPath, shard: str) -> bool:
    """Whether the shard has its receipt."""
    return exists(receipt_path(out, shard))


def committed_shards(out: str | UPath) -> set[str]:
    """The shards that have their receipt, by one listing."""
    return {name.removesuffix(".json") for name in list_names(to_path(out) / "commits") if name.endswith(".json")}


def read_receipt(out: str | UPath, shard: str) -> ShardReceipt:
    """The receipt of a committed shard.

    Raises:
        FileNotFoundError: the shard is not committed.
        IntegrityError: the receipt is damaged.
    """
    path = receipt_path(out, shard)
    return _as_shard_receipt(path, receipts.read_sealed(path, UNSEALED_RECEIPT, FIX_SHARD))


def _as_shard_receipt(path: str, value: dict[str, Any]) -> ShardReceipt:
    try:
        if "facts" in value:
            receipt = receipts.Receipt.decode(value, path)
            return ShardReceipt(files=dict(receipt.files), **receipt.facts)
        files = {value.pop("embeddings"): FileEntry(value.pop("sha256"), value.pop("bytes"))}
        failures, checksum = value.pop("failures"), value.pop("failures_sha256")
        return ShardReceipt(files=files | ({failures: FileEntry(checksum)} if failures else {}), **value)
    except (KeyError, TypeError, ValidationError) as error:
        raise IntegrityError(f"{path}: not the receipt of a shard ({error}): {FIX_SHARD}") from None


def read_receipts(out: str | UPath, shards: Sequence[str]) -> dict[str, ShardReceipt]:
    """The receipts of those of `shards` that are committed, from segments where those have them."""
    commits = Commits.list(out)
    names = [shard for shard in shards if shard in commits.identities]
    copies = commits.copies(names)

    alone = [shard for shard in names if shard not in copies]
    found = dict(zip(alone, map_ahead(partial(read_receipt, out), alone, ahead=16), strict=True))
    for shard, text in copies.items():  # each was checked when it was copied, and its segment just now
        value = json.loads(text)
        value.pop(receipts.SEAL, None)
        found[shard] = _as_shard_receipt(receipt_path(out, shard), value)
    return {shard: found[shard] for shard in names}


def compact_receipts(out: str | UPath) -> int:
    """Copy receipts that are in no segment into one, if there are many; how many."""
    return Commits.list(out).compact(UNSEALED_RECEIPT)


def read_shard(out: str | UPath, receipt: ShardReceipt, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one committed shard.

    Raises:
        IntegrityError: when the file is not the one the receipt was written for.
    """
    return read_parquet(_read_file(out, receipt, receipt.embeddings), columns)


def read_failures(out: str | UPath, receipt: ShardReceipt) -> pa.Table:
    """What failed or was damaged in one committed shard (nothing is an empty table)."""
    name = receipt.table_name(FAILURES)
    return with_kind(read_parquet(_read_file(out, receipt, name))) if name else FAILURE_SCHEMA.empty_table()


def read_silent(out: str | UPath, receipt: ShardReceipt) -> pa.Table:
    """The silent windows of one committed shard (none is an empty table)."""
    name = receipt.table_name(SILENT)
    return read_parquet(_read_file(out, receipt, name)) if name else SILENT_SCHEMA.empty_table()


def _read_file(out: str | UPath, receipt: ShardReceipt, name: str) -> bytes:
    return receipts.read_file(out, name, receipts.Receipt(receipt.files), FIX_SHARD)


@dataclass(frozen=True)
class EmbeddingSet:
    """A folder of embeddings, opened for reading. Only committed shards of the plan in force are seen."""

    path: UPath
    run: Mapping[str, Any]
    plan: Mapping[str, Any]
    receipts: Mapping[str, ShardReceipt]

    @classmethod
    def open(cls, directory: str | UPath) -> "EmbeddingSet":
        """Open `DIR` as written by `ray_jobs/embed_corpus.py`.

        Raises:
            FileNotFoundError: when there is no run.json or no plan.
            IntegrityError: when a receipt belongs to another encoder than run.json.
        """
        path = to_path(directory)
        try:
            run = receipts.read_sealed(path / "run.json", UNSEALED_RUN, FIX_RUN)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no run.json, so no embeddings were written here; run ray_jobs/embed_corpus.py --out {path}"
            ) from None
        plan = read_latest_plan(path)
        if plan is None:
            raise FileNotFoundError(
                f"{path}/manifest: no plan-*.json; relaunch the embed_corpus job that wrote run.json"
            )
        found = read_receipts(path, [shard["name"] for shard in plan["shards"]])
        for receipt in found.values():
            if receipt.fingerprint != run["fingerprint"]:
                raise IntegrityError(
                    f"{path}/commits/{receipt.shard}.json: encoder fingerprint {receipt.fingerprint}, expected "
                    f"{run['fingerprint']} (run.json): two encoders wrote here; embed again into a fresh folder"
                )
        return cls(path, run, plan, found)

    @property
    def settings(self) -> EmbedSettings:
        return EmbedSettings(**self.plan["settings"])

    @property
    def precision(self) -> str | None:
        """Of the encoder's arithmetic, as the shards' receipts say; None where it was not recorded."""
        return joined_precision(receipt.precision for receipt in self.receipts.values())

    @property
    def dim(self) -> int:
        return int(self.run["dim"])

    @property
    def fingerprint(self) -> str:
        return str(self.run["fingerprint"])

    @property
    def encoder(self) -> str:
        """The encoder string (folder, URI, `official:`, `timm:`) that the job was given."""
        return str(self.run["encoder"])

    @property
    def corpus_root(self) -> str:
        return str(self.run["corpus_root"])

    @property
    def shards(self) -> list[str]:
        """The committed shards, in the plan's order."""
        return list(self.receipts)

    @property
    def num_rows(self) -> int:
        return sum(receipt.rows for receipt in self.receipts.values())

    @property
    def complete(self) -> bool:
        """Whether every shard of the plan is committed."""
        return len(self.receipts) == len(self.plan["shards"])

    @property
    def column_names(self) -> list[str]:
        """Columns of the embedding tables; none while no shard is committed."""
        first = next(iter(self.receipts.values()), None)
        return read_shard(self.path, first).column_names if first else []

    @property
    def failed(self) -> int:
        """Inputs that gave no embedding."""
        return sum(receipt.failed for receipt in self.receipts.values())

    @property
    def damaged(self) -> int:
        """Files that were embedded but for a lost span."""
        return sum(receipt.damaged for receipt in self.receipts.values())

    def iter_tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """One table per committed shard, read a few ahead, in the plan's order.

        Raises:
            IntegrityError: when a file does not match its receipt.
        """
        return map_ahead(lambda receipt: read_shard(self.path, receipt, columns), self.receipts.values())

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in one table."""
        tables = list(self.iter_tables(columns))
        if not tables:
            return pa.table({name: [] for name in columns or RESERVED_COLUMNS})
        return pa.concat_tables(tables, promote_options="default")  # not every shard has a decode_note

    def vectors(self) -> np.ndarray:
        """All embeddings, `float32[N, D]`, in the order of `read()`."""
        parts = [column_to_vectors(table["embedding"]) for table in self.iter_tables(["embedding"])]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def failures(self) -> pa.Table:
        """Inputs without an embedding (kind `failed`) and lost spans of embedded ones (`damaged`): FAILURE_SCHEMA."""
        tables = map_ahead(lambda receipt: read_failures(self.path, receipt), self.receipts.values())
        return pa.concat_tables([FAILURE_SCHEMA.empty_table(), *tables])

    def silent(self) -> pa.Table:
        """Windows left out because nothing can be heard in them: uri, start_s, end_s, reason, peak_db."""
        tables = map_ahead(lambda receipt: read_silent(self.path, receipt), self.receipts.values())
        return pa.concat_tables([SILENT_SCHEMA.empty_table(), *tables])

    def vanished(self) -> pa.Table:
        """Rows (id, uri, start_s, end_s) whose files an update no longer found; they are not among `read()`."""
        name = self.plan.get("vanished")
        if name is None:
            return embedding_schema(self.settings).empty_table().select(["id", "uri", "start_s", "end_s"])
        files = receipts.Receipt({name["name"]: FileEntry(name["sha256"])})
        return read_parquet(receipts.read_file(self.path, name["name"], files, FIX_RUN))


def plans(out: str | UPath) -> Numbered:
    """The plans of a folder, one for each generation."""
    return Numbered(to_path(out) / "manifest", "plan-", UNSEALED_PLAN)


def read_latest_plan(out: str | UPath) -> dict[str, Any] | None:
    """The plan in force: the highest-numbered `manifest/plan-*.json`, or None."""
    plan = plans(out).latest()
    return None if plan is None else unfold_shards(plan)


def fold_shards(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as it is stored: the shards of each items file as one text, `name:group:items[:base],...`.

    A plan of 10^7 files has tens of thousands of shards; spelled out one by one they took longer to write than to plan.
    """
    texts: dict[str, list[str]] = {}
    for shard in plan["shards"]:
        base = f":{shard['base']}" if shard.get("base") else ""
        texts.setdefault(shard["file"], []).append(f"{shard['name']}:{shard['group']}:{shard['items']}{base}")
    files = [{**file, "shards": ",".join(texts.get(file["name"], []))} for file in plan["files"]]
    order = [shard["file"] for shard in plan["shards"]]
    assert order == sorted(order, key={file["name"]: number for number, file in enumerate(files)}.__getitem__)
    return {name: value for name, value in plan.items() if name != "shards"} | {"files": files}


def unfold_shards(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with its `shards` one by one, as older plans are stored already."""
    if "shards" in plan:
        return dict(plan)
    shards = []
    for file in plan["files"]:
        for text in filter(None, file["shards"].split(",")):
            name, group, items, *base = text.split(":")
            entry = {"name": name, "file": file["name"], "file_sha256": file["sha256"], "group": int(group)}
            shards.append({**entry, "items": int(items), "base": base[0] if base else None})
    files = [{name: value for name, value in file.items() if name != "shards"} for file in plan["files"]]
    return {**plan, "files": files, "shards": shards}


def write_run(out: str | UPath, record: Mapping[str, Any]) -> None:
    """Write run.json: what a reader needs to know of the folder."""
    receipts.write_sealed(to_path(out) / "run.json", record)


def collect_garbage(out: str | UPath, embeddings: EmbeddingSet | None = None) -> int:
    """Remove attempt files and old plans that nothing refers to; return how many. Only for a finished plan.

    Args:
        out: the folder.
        embeddings: the folder, where it is opened already.

    While a shard is uncommitted its attempts may still win (a worker can outlive its driver), so nothing is removed
    then; once all are committed, no attempt can win any more. Files of a later generation are left alone: another
    driver may just be planning an update.
    """
    out = to_path(out)
    embeddings = embeddings or EmbeddingSet.open(out)
    if not embeddings.complete:
        return 0
    plan = embeddings.plan
    keep = {f"commits/{shard}.json" for shard in embeddings.receipts}
    keep |= {f"manifest/plan-{plan['generation']:06d}.json"} | {file["name"] for file in plan["files"]}
    keep |= {plan["vanished"]["name"]} if plan.get("vanished") else set()
    for receipt in embeddings.receipts.values():
        keep |= set(receipt.files)
    # receipts first: a receipt must never name a file that is gone
    removed = 0
    for folder in ("commits", "manifest", EMBEDDINGS, FAILURES, SILENT, "vanished"):
        for name in list_names(out / folder):
            if is_segment(name):
                continue
            if f"{folder}/{name}" not in keep and _generation(name) <= plan["generation"]:
                remove(out / folder / name)
                removed += 1
    return removed


def _generation(name: str) -> int:
    """The generation in a file name such as `plan-000001.json` or `000001-000007-ab12.parquet`; 0 without one."""
    found = re.match(r"\.?(?:[a-z]+-)?(\d{6})\b", name)
    return int(found[1]) if found else 0


def write_table(path: UPath, table: pa.Table) -> str:
    """Write a Parquet file whole; return its SHA-256."""
    data = parquet_bytes(table)
    write_bytes(path, data)
    return sha256_bytes(data)
