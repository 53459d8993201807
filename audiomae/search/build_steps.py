"""The steps of a build that make its pieces: rows, the quantiser, the lists of rows, segments.

Each is a plain function of where things lie, does nothing when its piece is finished, and can run on any node.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from audiomae import storage
from audiomae.artifacts import releases
from audiomae.artifacts.embeddings import read_receipt, read_shard
from audiomae.artifacts.tables import column_to_vectors
from audiomae.cpus import available_cpus
from audiomae.errors import IntegrityError
from audiomae.search import index as ann
from audiomae.search import segments
from audiomae.search.items import ItemsWriter
from audiomae.search.pieces import Place, each_local, local_copy, make_piece
from audiomae.search.plan import OldRows, Part, SegmentPlan, Slice
from audiomae.search.segments import Source
from audiomae.search.spec import IndexSpec

HELD_OUT = 64  # one id in so many is never trained on: the queries that recall is measured with
ASSIGN_ROWS = 250_000


def write_rows(part: Part, place: Place) -> dict[str, Any]:
    """Write the rows of a part, unless that was done before; return its facts."""

    def write(out: Path) -> dict[str, Any]:
        read = []
        start = 0
        for piece in part.slices:
            keep = part.keep[start : start + piece.stop - piece.start]
            start += piece.stop - piece.start
            read.append(_read_slice(piece, keep))
        table = pa.concat_tables([table for table, _ in read], promote_options="permissive")
        vectors = [rows for _, rows in read]
        ann.write_row_store(iter(vectors), vectors[0].shape[1], table.num_rows, out / ann.VECTORS_FILE)
        segments.write_ids(table.column("id").to_numpy(), out)
        with ItemsWriter(out, table.schema, parquet=False) as writer:
            writer.write(table)
        return {"rows": table.num_rows}

    return make_piece(place, place.part(part), write)


def _read_slice(piece: Slice, keep: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Items and float16 vectors of the kept rows."""
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


# --- the quantiser and lists ------------------------------------------------------------------------------------------


def train(spec: IndexSpec, made: Sequence[SegmentPlan], place: Place, name: str, seed: int) -> dict[str, Any]:
    """Train a quantiser on a sample of the rows, unless that was done before; return its facts."""

    def write(out: Path) -> dict[str, Any]:
        with ann.threads(available_cpus()):
            vectors = sample(made, place, spec.nlist * ann.TRAIN_ROWS_PER_LIST, seed)
            ann.train(spec, vectors, out, seed)
        return {"rows": len(vectors)}

    return make_piece(place, name, write)


def sample(made: Sequence[SegmentPlan], place: Place, count: int, seed: int) -> np.ndarray:
    """`count` rows (or all there are) to train on, float16[n, D]: drawn evenly, never a held-out id, in row order."""
    pieces: list[OldRows | Part] = []
    for plan in made:
        pieces += [*plan.old, *plan.parts]
    sizes = np.cumsum([0, *(piece.num_rows for piece in pieces)])
    rng = np.random.default_rng(seed)
    wanted = min(int(sizes[-1]), round(count * (1 + 2 / HELD_OUT)) + 8)
    chosen = np.sort(rng.choice(sizes[-1], size=wanted, replace=False))
    found = []
    for number, piece in enumerate(pieces):
        mine = chosen[(chosen >= sizes[number]) & (chosen < sizes[number + 1])] - sizes[number]
        with local_copy(place.path(_name_of(piece, place)), (ann.VECTORS_FILE, segments.IDS_FILE)) as folder:
            ids = np.load(folder / segments.IDS_FILE, mmap_mode="r")
            rows = mine if isinstance(piece, Part) else np.delete(np.arange(piece.rows), piece.dropped)[mine]
            rows = rows[~held_out(ids[rows])]
            found.append(ann.RowStore(folder / ann.VECTORS_FILE).rows[rows])
    return np.concatenate(found)[:count]


def held_out(ids: np.ndarray) -> np.ndarray:
    """Which ids are kept out of training, bool[N]: a fixed choice, as ids are hashes."""
    return ids % HELD_OUT == 0


def to_assign(pieces: Sequence[OldRows | Part], place: Place, quantiser: str) -> list[tuple[Any, ...]]:
    """The calls of `assign_rows` for some pieces."""
    calls: list[tuple[Any, ...]] = []
    for piece in pieces:
        total = _all_rows(piece)
        for start in range(0, total, ASSIGN_ROWS):
            calls.append((_name_of(piece, place), start, min(start + ASSIGN_ROWS, total), place, quantiser))
    return calls


def assign_rows(name: str, start: int, stop: int, place: Place, quantiser: str) -> dict[str, Any]:
    """Find the lists of some rows of a part or segment, unless that was done before; return the facts."""

    def write(out: Path) -> dict[str, Any]:
        with (
            local_copy(place.path(name), (ann.VECTORS_FILE,)) as folder,
            local_copy(place.path(quantiser), (ann.TRAINED_FILE,)) as trained,
        ):
            rows = ann.RowStore(folder / ann.VECTORS_FILE).rows[start:stop]
            np.save(out / ann.ASSIGN_FILE, ann.assign(trained / ann.TRAINED_FILE, rows))
        return {"rows": stop - start}

    return make_piece(place, _assigned_name(name, start, place, quantiser), write)


def _assigned_name(name: str, start: int, place: Place, quantiser: str) -> str:
    key = storage.sha256_bytes(storage.encode_json([name or place.base, quantiser, start]))[:16]
    return f"parts/{place.prefix}-lists-{key}"


def _all_rows(piece: OldRows | Part) -> int:
    return piece.num_rows if isinstance(piece, Part) else piece.rows


def _name_of(piece: OldRows | Part, place: Place) -> str:
    return place.part(piece) if isinstance(piece, Part) else piece.name


# --- segments ---------------------------------------------------------------------------------------------------------


def make_segment(plan: SegmentPlan, spec: IndexSpec, place: Place, quantiser: str, dim: int) -> dict[str, Any]:
    """Write a segment, unless that was done before; return its facts."""

    def write(out: Path) -> dict[str, Any]:
        pieces: list[OldRows | Part] = [*plan.old, *plan.parts]
        needed = (ann.VECTORS_FILE, segments.IDS_FILE, "items.arrow", ann.ASSIGN_FILE)
        with each_local([place.path(_name_of(piece, place)) for piece in pieces], needed) as folders:
            sources = [
                Source(
                    folder,
                    piece.dropped if isinstance(piece, OldRows) else np.zeros(0, np.int64),
                    _find_lists(piece, place, quantiser),
                )
                for piece, folder in zip(pieces, folders, strict=True)
            ]
            if not quantiser:
                return segments.write_segment(sources, spec, None, out)
            with local_copy(place.path(quantiser), (ann.TRAINED_FILE,)) as trained:
                return segments.write_segment(sources, spec, trained / ann.TRAINED_FILE, out)

    return make_piece(place, place.segment(plan, spec, quantiser), write)


def _find_lists(piece: OldRows | Part, place: Place, quantiser: str) -> np.ndarray | None:
    """The lists that `assign_rows` found; None for an older segment that has its own."""
    if not quantiser:
        return None
    name = _name_of(piece, place)
    found = []
    for start in range(0, _all_rows(piece), ASSIGN_ROWS):
        path = place.path(_assigned_name(name, start, place, quantiser))
        if releases.read_piece(place.index, _assigned_name(name, start, place, quantiser)) is None:
            return None
        with local_copy(path, (ann.ASSIGN_FILE,)) as folder:
            found.append(np.load(folder / ann.ASSIGN_FILE))
    return np.concatenate(found)
