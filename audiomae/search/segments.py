"""A segment: some rows of a release with all that belongs to them, in one directory that never changes.

    vectors.faiss                          every vector as float16 (the row store)
    ids.npy sorted_ids.npy sorted_rows.npy the clip ids in row order; in ascending order, with their rows
    items.arrow items.parquet              the items table, to be mapped and for other tools
    column-*.arrow                         its columns as flat arrays, for filters
    assign.npy lists.bin layout.npy        the inverted lists, of the release's quantiser (larger releases)
    index.faiss                            or a graph (`--index HNSW...`)

It is written from sources (freshly read parts, older segments) as a stream: rows, ids and items of one source after
the other, less the rows that are deleted. Memory does not grow with the vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from audiomae.errors import UserError
from audiomae.search import index as ann
from audiomae.search.items import Items, ItemsWriter, write_columns
from audiomae.search.spec import IndexSpec

IDS_FILE, SORTED_IDS_FILE, SORTED_ROWS_FILE = "ids.npy", "sorted_ids.npy", "sorted_rows.npy"
BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Source:
    """Rows to go into a segment.

    Attributes:
        folder: a local directory with a row store, ids and items.
        dropped: int64, rows of it that are left out, ascending.
        assigned: the lists of its rows by the quantiser to be used; None to take what lies in the folder.
    """

    folder: Path
    dropped: np.ndarray
    assigned: np.ndarray | None = None

    def blocks(self, count: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, stop, keep bool[stop - start]) of every block of rows."""
        for start in range(0, count, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, count)
            keep = np.ones(stop - start, bool)
            keep[self.dropped[np.searchsorted(self.dropped, start) : np.searchsorted(self.dropped, stop)] - start] = (
                False
            )
            yield start, stop, keep


def write_segment(sources: Sequence[Source], spec: IndexSpec, trained: Path | None, out: Path) -> dict[str, Any]:
    """Write a segment into the directory `out`; return its facts.

    Args:
        sources: rows in order.
        spec: what stands before the row store.
        trained: the trained file, for inverted lists.
        out: an empty directory.

    Raises:
        UserError: sources whose columns do not go together.
    """
    ids = np.concatenate([np.delete(np.load(source.folder / IDS_FILE), source.dropped) for source in sources])
    write_ids(ids, out)
    stores = [ann.RowStore(source.folder / ann.VECTORS_FILE) for source in sources]
    blocks = (
        store.rows[start:stop][keep]
        for source, store in zip(sources, stores, strict=True)
        for start, stop, keep in source.blocks(store.num_rows)
    )
    ann.write_row_store(blocks, stores[0].dim, len(ids), out / ann.VECTORS_FILE)
    _write_items(sources, out)
    if spec.kind == "ivf":
        assert trained is not None
        lists = np.concatenate([np.delete(_assigned(source), source.dropped) for source in sources])
        np.save(out / ann.ASSIGN_FILE, lists)
        ann.encode(trained, ann.RowStore(out / ann.VECTORS_FILE).rows, lists, out)
    elif spec.kind == "hnsw":
        ann.build_graph(spec.factory, ann.RowStore(out / ann.VECTORS_FILE).rows, out / ann.INDEX_FILE)
    return {"rows": len(ids), "schema": Items(out).table.schema.serialize().to_pybytes().hex()}


def write_ids(ids: np.ndarray, out: Path) -> None:
    """Write the ids in both orders."""
    order = np.argsort(ids, kind="stable")
    np.save(out / IDS_FILE, ids)
    np.save(out / SORTED_IDS_FILE, ids[order])
    np.save(out / SORTED_ROWS_FILE, order.astype(np.uint32 if len(ids) < 2**32 else np.uint64))


def _assigned(source: Source) -> np.ndarray:
    if source.assigned is not None:
        return source.assigned
    lists: np.ndarray = np.load(source.folder / ann.ASSIGN_FILE, mmap_mode="r")
    return lists


def _write_items(sources: Sequence[Source], out: Path) -> None:
    tables = [Items(source.folder).table for source in sources]
    schema = unify([table.schema for table in tables])
    with ItemsWriter(out, schema) as writer:
        for source, table in zip(sources, tables, strict=True):
            for start, stop, keep in source.blocks(table.num_rows):
                piece = table.slice(start, stop - start)
                writer.write(piece if keep.all() else piece.filter(pa.array(keep)))
    write_columns(out)


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for items that are to be found together.

    Raises:
        UserError: a column that has types which do not go together.
    """
    try:
        return pa.unify_schemas([schema.remove_metadata() for schema in schemas], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the embedding sets disagree about a manifest column ({error}): give it one type in every listing"
        ) from None


def read_schema(facts: Mapping[str, Any]) -> pa.Schema:
    """The columns of a segment's items, from its facts."""
    return pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(facts["schema"])))
