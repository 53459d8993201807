"""Embedding shards on disk or S3: how they are committed, read, verified and cleaned up.

```
DIR/run.json                        who made this: encoder, fingerprint, dim, windowing, corpus, counts
DIR/manifest/plan-000000.json       the plan in force (the highest number); names its items files and shards
DIR/manifest/items-*.parquet        the work items, one row group per shard
DIR/embeddings/<shard>-<attempt>.parquet
DIR/failures/<shard>-<attempt>.parquet
DIR/commits/<shard>.json            the receipt; it is written last and *is* the done-marker
DIR/vanished/*.parquet              rows of files that a later `--update` no longer found
```

Several processes may embed the same shard (a retry, a second driver, a worker that outlived its driver): each writes
files under its own attempt name, and the receipt is created exclusively, so exactly one attempt counts. Readers trust
receipts alone; `collect_garbage` removes what no receipt names once every shard of the plan is committed.
"""

import re
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from audiomae.config import StrictConfig
from audiomae.errors import IntegrityError
from audiomae.storage import encode_json, put_if_absent, read_bytes, read_json, sha256_bytes, to_path, write_bytes

RESERVED_COLUMNS = ("id", "uri", "start_s", "end_s", "embedding")
FAILURE_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("stage", pa.string()),
        ("error_class", pa.string()),
        ("message", pa.string()),
    ]
)
READ_AHEAD = 4

Value = TypeVar("Value")


class EmbedSettings(StrictConfig):
    """What decides the vectors of a corpus: two runs with equal settings give equal rows."""

    fingerprint: str
    dim: int
    sample_rate: int
    mode: Literal["windows", "file"]
    window_s: float
    hop_s: float
    vector_dtype: Literal["float32", "float16"] = "float32"


class Receipt(StrictConfig):
    """The commit of one shard (`commits/<shard>.json`)."""

    shard: str
    attempt: str
    inputs: int
    rows: int
    failed: int
    audio_s: float
    embeddings: str
    sha256: str
    bytes: int
    failures: str | None
    failures_sha256: str | None
    fingerprint: str
    manifest: str


def embedding_schema(settings: EmbedSettings, extra: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of an embedding shard: id, uri, start_s, end_s, embedding `[dim]`, then the manifest's own columns."""
    vector = pa.list_(pa.float16() if settings.vector_dtype == "float16" else pa.float32(), settings.dim)
    own = [("id", pa.int64()), ("uri", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())]
    return pa.schema([pa.field(*field) for field in own] + [pa.field("embedding", vector)] + list(extra))


def vectors_to_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """`float[N, D]` as a column every Parquet reader understands (numpy's own becomes an extension type)."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def column_to_vectors(column: pa.ChunkedArray) -> np.ndarray:
    """An embedding column as `float32[N, D]`."""
    dim = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) for chunk in column.chunks]
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros((0, dim), np.float32)


def new_attempt() -> str:
    """A name no other attempt has."""
    return uuid.uuid4().hex[:12]


def commit_shard(
    out: str | UPath,
    shard: str,
    table: pa.Table,
    failures: pa.Table,
    *,
    settings: EmbedSettings,
    manifest: str,
    inputs: int,
    audio_s: float,
) -> bool:
    """Write one shard and its failures, then its receipt; of several attempts exactly one returns `True`.

    The loser removes what it wrote. A conditional put that was retried after a lost answer may report the writer's
    own receipt as someone else's, so a refusal is checked against the attempt name in the stored receipt.
    """
    out = to_path(out)
    attempt = new_attempt()
    data = _parquet_bytes(table)
    failure_data = _parquet_bytes(failures) if failures.num_rows else None
    name, failure_name = f"embeddings/{shard}-{attempt}.parquet", f"failures/{shard}-{attempt}.parquet"
    write_bytes(out / name, data)
    if failure_data is not None:
        write_bytes(out / failure_name, failure_data)
    receipt = Receipt(
        shard=shard,
        attempt=attempt,
        inputs=inputs,
        rows=table.num_rows,
        failed=failures.num_rows,
        audio_s=round(audio_s, 6),
        embeddings=name,
        sha256=sha256_bytes(data),
        bytes=len(data),
        failures=failure_name if failure_data is not None else None,
        failures_sha256=sha256_bytes(failure_data) if failure_data is not None else None,
        fingerprint=settings.fingerprint,
        manifest=manifest,
    )
    path = out / "commits" / f"{shard}.json"
    if put_if_absent(path, encode_json(receipt.model_dump())) or read_json(path)["attempt"] == attempt:
        return True
    (out / name).unlink()
    if failure_data is not None:
        (out / failure_name).unlink()
    return False


def is_committed(out: str | UPath, shard: str) -> bool:
    """Whether the shard has its receipt."""
    return (to_path(out) / "commits" / f"{shard}.json").exists()


def read_receipts(out: str | UPath, shards: Sequence[str]) -> dict[str, Receipt]:
    """The receipts of those of `shards` that are committed."""
    directory = to_path(out) / "commits"
    present = {path.name.removesuffix(".json") for path in _list(directory)}
    names = [shard for shard in shards if shard in present]
    values = map_ahead(lambda shard: read_json(directory / f"{shard}.json"), names, ahead=16)
    return {name: Receipt(**value) for name, value in zip(names, values, strict=True)}


def read_shard(
    out: str | UPath, receipt: Receipt, columns: Sequence[str] | None = None, verify: bool = True
) -> pa.Table:
    """The rows of one committed shard.

    Raises:
        IntegrityError: when the file is not the one the receipt was written for.
    """
    return _read_parquet(to_path(out) / receipt.embeddings, receipt.sha256 if verify else None, columns)


def read_failures(out: str | UPath, receipt: Receipt, verify: bool = True) -> pa.Table:
    """The failure rows of one committed shard (none is an empty table)."""
    if receipt.failures is None:
        return FAILURE_SCHEMA.empty_table()
    return _read_parquet(to_path(out) / receipt.failures, receipt.failures_sha256 if verify else None, None)


@dataclass(frozen=True)
class EmbeddingSet:
    """A folder of embeddings, opened for reading. Only committed shards of the plan in force are seen."""

    path: UPath
    run: Mapping[str, Any]
    plan: Mapping[str, Any]
    receipts: Mapping[str, Receipt]

    @classmethod
    def open(cls, directory: str | UPath) -> "EmbeddingSet":
        """Open `DIR` as written by `ray_jobs/embed_corpus.py`.

        Raises:
            FileNotFoundError: when there is no run.json or no plan.
            IntegrityError: when a receipt belongs to another encoder than run.json.
        """
        path = to_path(directory)
        if not (path / "run.json").exists():
            raise FileNotFoundError(
                f"{path}: no run.json, so no embeddings were written here; run ray_jobs/embed_corpus.py --out {path}"
            )
        run = read_json(path / "run.json")
        plan = read_latest_plan(path)
        if plan is None:
            raise FileNotFoundError(
                f"{path}/manifest: no plan-*.json; relaunch the embed_corpus job that wrote run.json"
            )
        receipts = read_receipts(path, [shard["name"] for shard in plan["shards"]])
        for receipt in receipts.values():
            if receipt.fingerprint != run["fingerprint"]:
                raise IntegrityError(
                    f"{path}/commits/{receipt.shard}.json: encoder fingerprint {receipt.fingerprint}, expected "
                    f"{run['fingerprint']} (run.json): two encoders wrote here; embed again into a fresh folder"
                )
        return cls(path, run, plan, receipts)

    @property
    def settings(self) -> EmbedSettings:
        return EmbedSettings(**self.plan["settings"])

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

    def iter_tables(self, columns: Sequence[str] | None = None, verify: bool = True) -> Iterator[pa.Table]:
        """One table per committed shard, read a few ahead, in the plan's order.

        Raises:
            IntegrityError: when a file does not match its receipt (`verify=False` skips the checksum).
        """
        return map_ahead(lambda receipt: read_shard(self.path, receipt, columns, verify), self.receipts.values())

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in one table."""
        tables = list(self.iter_tables(columns))
        return pa.concat_tables(tables) if tables else pa.table({name: [] for name in columns or RESERVED_COLUMNS})

    def vectors(self) -> np.ndarray:
        """All embeddings, `float32[N, D]`, in the order of `read()`."""
        parts = [column_to_vectors(table["embedding"]) for table in self.iter_tables(["embedding"])]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def failures(self) -> pa.Table:
        """Every input that gave no embedding: uri, start_s, end_s, stage, error_class, message."""
        tables = map_ahead(lambda receipt: read_failures(self.path, receipt), self.receipts.values())
        return pa.concat_tables([FAILURE_SCHEMA.empty_table(), *tables])

    def vanished(self) -> pa.Table:
        """Rows (id, uri, start_s, end_s) whose files an update no longer found; they are not among `read()`."""
        name = self.plan.get("vanished")
        if name is None:
            return embedding_schema(self.settings).empty_table().select(["id", "uri", "start_s", "end_s"])
        return _read_parquet(self.path / name["name"], name["sha256"], None)


def read_latest_plan(out: str | UPath) -> dict[str, Any] | None:
    """The plan in force: the highest-numbered `manifest/plan-*.json`, or None."""
    names = sorted(path.name for path in _list(to_path(out) / "manifest") if path.name.startswith("plan-"))
    return read_json(to_path(out) / "manifest" / names[-1]) if names else None


def collect_garbage(out: str | UPath) -> int:
    """Remove attempt files and old plans that nothing refers to; return how many. Only for a finished plan.

    While a shard is uncommitted its attempts may still win (a worker can outlive its driver), so nothing is removed
    then; once all are committed, no attempt can win any more. Files of a later generation are left alone: another
    driver may just be planning an update.
    """
    out = to_path(out)
    embeddings = EmbeddingSet.open(out)
    if not embeddings.complete:
        return 0
    plan = embeddings.plan
    keep = {f"commits/{shard}.json" for shard in embeddings.receipts}
    keep |= {f"manifest/plan-{plan['generation']:06d}.json"} | {file["name"] for file in plan["files"]}
    keep |= {plan["vanished"]["name"]} if plan.get("vanished") else set()
    for receipt in embeddings.receipts.values():
        keep |= {receipt.embeddings, receipt.failures or ""}
    # receipts first: a receipt must never name a file that is gone
    removed = 0
    for folder in ("commits", "manifest", "embeddings", "failures", "vanished"):
        for path in _list(out / folder):
            if f"{folder}/{path.name}" not in keep and _generation(path.name) <= plan["generation"]:
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def _generation(name: str) -> int:
    """The generation in a file name such as `plan-000001.json` or `000001-000007-ab12.parquet`; 0 without one."""
    found = re.match(r"\.?(?:[a-z]+-)?(\d{6})\b", name)
    return int(found[1]) if found else 0


def map_ahead(function: Callable[[Any], Value], items: Any, ahead: int = READ_AHEAD) -> Iterator[Value]:
    """`map` in a few threads, in order, with no more than `ahead` results waiting."""
    pending: deque[Future[Value]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_table(path: UPath, table: pa.Table) -> str:
    """Write a Parquet file whole; return its SHA-256."""
    data = _parquet_bytes(table)
    write_bytes(path, data)
    return sha256_bytes(data)


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    # vectors do not compress and have no useful dictionary; everything else does
    dictionary = [name for name in table.column_names if name != "embedding"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=dictionary)
    return sink.getvalue().to_pybytes()


def _read_parquet(path: UPath, sha256: str | None, columns: Sequence[str] | None) -> pa.Table:
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise IntegrityError(
            f"{path}: named by its receipt but missing; restore it, or delete its commits/*.json and relaunch the job"
        ) from None
    if sha256 is not None and (got := sha256_bytes(data)) != sha256:
        raise IntegrityError(
            f"{path}: sha256 {got}, expected {sha256} (its receipt): the file was changed or damaged; restore it, or "
            "delete its commits/*.json and relaunch the job to embed it again"
        )
    return pq.read_table(pa.BufferReader(data), columns=list(columns) if columns is not None else None)


def _list(directory: UPath) -> list[UPath]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # UPath says the latter of an S3 prefix without objects
        return []
