"""Carrying out a build plan: parts of rows, a trained index, indexed parts, and the files of the new release.

    make_plan(...)  (build_plan.py) compares the embedding sets with the release in force
    write_rows(...) one part: rows of some shards -> vectors.npy, ids.npy, items.parquet       (many at once)
    sample(...)     rows of the parts to train on
    index_part(...) one part: its rows added to a copy of the trained index                    (many at once)
    assemble(...)   parts, after the release they extend, -> the files of the new release

Nothing here knows about Ray; `ray_jobs/build_index.py` runs the parts as tasks. A part lies below `INDEX/parts/<key>/`
with a receipt written last; the key is a hash of all that decides its content, so a build that was interrupted finds
what it had finished.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from audiomae import storage
from audiomae.artifacts.embeddings import read_receipt, read_shard
from audiomae.artifacts.releases import fetch, resolve
from audiomae.artifacts.tables import column_to_vectors
from audiomae.errors import IntegrityError, UserError
from audiomae.search import index as ann
from audiomae.search.build_plan import Part, Plan, Slice
from audiomae.search.items import Items, ItemsWriter
from audiomae.search.spec import IndexSpec

ROWS_FILE, RECEIPT_FILE, ITEMS_FILE, PART_INDEX_FILE = "vectors.npy", "receipt.json", "items.parquet", "index.faiss"
HELD_OUT = 64  # one id in so many is never trained on: the queries that recall is measured with
BLOCK_ROWS = 65_536


def write_rows(part: Part, parts_dir: str) -> dict[str, Any]:
    """Write the rows of a part, unless that was done before; return its receipt."""
    target = storage.to_path(parts_dir) / part.key
    done = _receipt(target)
    if done:
        return done
    tables, vectors, start = [], [], 0
    for piece in part.slices:
        keep = part.keep[start : start + piece.stop - piece.start]
        start += piece.stop - piece.start
        table, rows = _read_slice(piece, keep)
        tables.append(table)
        vectors.append(rows)
    table = pa.concat_tables(tables, promote_options="permissive")
    with _working_dir(target) as work:
        np.save(work / ROWS_FILE, np.concatenate(vectors))
        np.save(work / ann.IDS_FILE, table.column("id").to_numpy())
        pq.write_table(table, work / ITEMS_FILE, compression="zstd")
    return _write_receipt(target, [ROWS_FILE, ann.IDS_FILE, ITEMS_FILE], {"rows": table.num_rows})


def sample(parts: Sequence[Part], parts_dir: str, count: int, seed: int) -> np.ndarray:
    """`count` rows (or all there are) to train on, float16[n, D]: drawn evenly, never a held-out id, in row order."""
    root = storage.to_path(parts_dir)
    eligible = [np.flatnonzero(~held_out(_read_array(root / part.key / ann.IDS_FILE))) for part in parts]
    sizes = np.cumsum([0, *map(len, eligible)])
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(sizes[-1], size=min(count, int(sizes[-1])), replace=False))
    found = []
    for number, part in enumerate(parts):
        mine = chosen[(chosen >= sizes[number]) & (chosen < sizes[number + 1])] - sizes[number]
        if len(mine):
            found.append(_read_array(root / part.key / ROWS_FILE)[eligible[number][mine]])
    return np.concatenate(found)


def held_out(ids: np.ndarray) -> np.ndarray:
    """Which ids are kept out of training, bool[N]: a fixed choice, as ids are hashes."""
    return ids % HELD_OUT == 0


def train(spec: IndexSpec, parts: Sequence[Part], parts_dir: str, seed: int) -> str:
    """Train the index on a sample of the parts, unless that was done before; return where it lies."""
    name = storage.sha256_bytes(storage.encode_json([spec.factory, seed, [part.key for part in parts]]))[:16]
    target = storage.to_path(parts_dir) / f"trained-{name}"
    if not _receipt(target):
        vectors = sample(parts, parts_dir, spec.nlist * ann.TRAIN_ROWS_PER_LIST, seed)
        with _working_dir(target) as work, ann.threads(os.cpu_count() or 1):
            ann.train(spec, vectors, work / ann.TRAINED_FILE, seed)
        _write_receipt(target, [ann.TRAINED_FILE], {"rows": len(vectors)})
    return str(target / ann.TRAINED_FILE)


def index_part(part: Part, parts_dir: str, trained: str) -> dict[str, Any]:
    """Add the rows of a part to a copy of the trained index, unless that was done before; return the receipt."""
    target = storage.to_path(parts_dir) / part.key
    name = _index_name(trained)
    done = _receipt(target / name)
    if done:
        return done
    with _working_dir(target / name) as work:
        local = work / ann.TRAINED_FILE
        storage.copy_file(trained, local)
        ann.build_part(local, _read_array(target / ROWS_FILE), work / PART_INDEX_FILE)
        local.unlink()
    return _write_receipt(target / name, [PART_INDEX_FILE], {"rows": part.num_rows})


def assemble(work: Plan, parts_dir: str, trained: str | None, dim: int, staging: Path) -> None:
    """Write the index files of the new release (all but the encoder) into `staging`.

    Rows keep their order: those of the release that is extended, then part after part.
    """
    root = storage.to_path(parts_dir)
    base = Path(str(fetch(work.base).path)) if work.base else None
    folders = [storage.fetch_dir(root / part.key) for part in work.parts]
    try:
        ids = [np.load(folder / ann.IDS_FILE) for folder in ([base] if base else []) + folders]
        np.save(staging / ann.IDS_FILE, np.concatenate(ids))
        np.save(staging / ann.DELETED_FILE, work.deleted)
        np.save(staging / ann.BLOCKED_FILE, work.blocked)
        ann.write_row_store(_row_blocks(base, folders), dim, staging / ann.VECTORS_FILE)
        _write_items(base, folders, staging)
        if trained:
            name = _index_name(trained)
            storage.copy_file(trained, staging / ann.TRAINED_FILE)
            first = [base / ann.INDEX_FILE] if base else []
            ann.merge(first + [folder / name / PART_INDEX_FILE for folder in folders], staging / ann.INDEX_FILE)
    finally:
        if not storage.is_local(root):
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def tidy(parts_dir: str, work: Plan, keep_parts: bool) -> None:
    """Remove the parts of older builds, and of this one unless they are to be kept."""
    root = storage.to_path(parts_dir)
    keep = {part.key for part in work.parts} if keep_parts else set()
    for name in storage.list_names(root):
        if name not in keep:
            storage.remove_tree(root / name)


def _read_slice(piece: Slice, keep: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Items and float16 vectors of the kept rows."""
    if not piece.shard:
        folder = _local_release(piece.directory)
        table = Items(folder).table.slice(piece.start, len(keep)).filter(pa.array(keep))
        return table, ann.read_rows(folder, piece.start, piece.stop)[keep]
    directory = storage.to_path(piece.directory)
    receipt = read_receipt(directory, piece.shard)
    if receipt.sha256 != piece.sha256:
        raise IntegrityError(
            f"{directory}: shard {piece.shard} changed while it was indexed: SHA-256 {receipt.sha256}, expected "
            f"{piece.sha256}; run the same command again once the embedding job is done"
        )
    table = read_shard(directory, receipt).slice(piece.start, len(keep)).filter(pa.array(keep))
    rows = ann.to_rows(column_to_vectors(table.column("embedding")), f"{directory}, shard {piece.shard}")
    table = table.drop_columns(["embedding"])
    if "corpus" in table.column_names:  # the name is ours: what the manifest called so stays under another
        table = table.rename_columns({"corpus": "manifest_corpus"})
    corpus = pa.array(np.full(table.num_rows, piece.corpus, dtype=np.int32))
    return table.append_column("corpus", corpus), rows


def _local_release(directory: str) -> Path:
    path = storage.to_path(directory)
    return Path(str(path if storage.is_local(path) else fetch(resolve(directory)).path))


def _row_blocks(base: Path | None, folders: Sequence[Path]) -> Iterator[np.ndarray]:
    if base:
        total = len(np.load(base / ann.IDS_FILE, mmap_mode="r"))
        for start in range(0, total, BLOCK_ROWS):
            yield ann.read_rows(base, start, min(start + BLOCK_ROWS, total))
    for folder in folders:
        rows = np.load(folder / ROWS_FILE, mmap_mode="r")
        for start in range(0, len(rows), BLOCK_ROWS):
            yield rows[start : start + BLOCK_ROWS]


def _write_items(base: Path | None, folders: Sequence[Path], staging: Path) -> None:
    schemas = [Items(base).table.schema] if base else []
    schemas += [pq.read_schema(folder / ITEMS_FILE) for folder in folders]
    try:
        schema = pa.unify_schemas([s.remove_metadata() for s in schemas], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the embedding sets disagree about a manifest column ({error}): give it one type in every listing"
        ) from None
    with ItemsWriter(staging, schema) as writer:
        if base:
            writer.write(Items(base).table)
        for folder in folders:
            writer.write(pq.read_table(folder / ITEMS_FILE))


def _index_name(trained: str) -> str:
    return f"index-{storage.sha256_file(trained)[:12]}"


def _read_array(path: UPath) -> np.ndarray:
    if storage.is_local(path):
        return np.load(str(path), mmap_mode="r")
    return np.load(io.BytesIO(storage.read_bytes(path)))


@contextmanager
def _working_dir(target: UPath) -> Iterator[Path]:
    """A local directory whose files go to `target`, each whole or absent, when the block ends well."""
    local = storage.is_local(target)
    if local:
        target.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=str(target) if local else None))
    try:
        yield work
        for file in work.iterdir():
            if local:
                os.replace(file, str(target / file.name))
            else:
                storage.copy_file(file, target / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_receipt(target: UPath, files: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    receipt = dict(facts) | {"files": {name: storage.sha256_file(target / name) for name in files}}
    storage.write_json(target / RECEIPT_FILE, receipt)
    return receipt


def _receipt(target: UPath) -> dict[str, Any] | None:
    """The receipt of finished work; None when there is none or a file is not what it says."""
    try:
        receipt: dict[str, Any] = storage.read_json(target / RECEIPT_FILE)
        same = all(storage.sha256_file(target / name) == sha for name, sha in receipt["files"].items())
    except (FileNotFoundError, IntegrityError):
        return None
    return receipt if same else None
