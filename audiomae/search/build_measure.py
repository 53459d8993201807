"""The steps of a build that look at the whole release to be: recall of held-out queries, search settings, the map."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiomae.cpus import available_cpus
from audiomae.scratch import scratch
from audiomae.search import index as ann
from audiomae.search import segments, tuning
from audiomae.search.build_steps import held_out
from audiomae.search.items import ItemsTable
from audiomae.search.layout import MAP_FILE, write_map
from audiomae.search.pieces import Place, each_local, local_copy
from audiomae.search.searcher import Searcher
from audiomae.search.tuning import Block, Exact, Neighbours, Queries, Recall, Task


def pick_queries(task: Task, place: Place, deleted: np.ndarray) -> Queries:
    """Held-out rows to query with."""
    with _release(task, place, (segments.IDS_FILE, ann.VECTORS_FILE, ann.ASSIGN_FILE)) as (folders, _):
        return tuning.pick_queries(task, folders, deleted, held_out)


def kept_queries(task: Task, place: Place, deleted: np.ndarray, kept: Neighbours) -> tuple[Queries, Neighbours]:
    """The queries whose exact answers are kept, and what is left of these."""
    with _release(task, place, (segments.IDS_FILE, ann.VECTORS_FILE)) as (folders, _):
        return tuning.kept_queries(task, folders, deleted, kept)


def exact_block(task: Task, place: Place, deleted: np.ndarray, queries: Queries, block: Block) -> Exact:
    """Exact answers among some rows, of all queries and filters."""
    name = task.segments[block.segment]
    with local_copy(place.path(name), (segments.IDS_FILE, ann.VECTORS_FILE, ann.ASSIGN_FILE)) as folder:
        return tuning.exact_block(task, folder, deleted, queries, block)


def tune(
    task: Task,
    place: Place,
    deleted: np.ndarray,
    queries: Queries,
    answers: list[np.ndarray],
    target: float | None,
) -> Recall:
    """Search settings that reach the target; without one, what those in force reach."""
    with _release(task, place, None) as (folders, trained), ann.threads(available_cpus()):
        return tuning.tune(Searcher.open(folders, trained, task.spec), task.spec, deleted, queries, answers, target)


@contextmanager
def _release(task: Task, place: Place, files: tuple[str, ...] | None) -> Iterator[tuple[list[Path], Path | None]]:
    names = [*task.segments, *([task.quantiser] if task.quantiser else [])]
    with each_local([place.path(name) for name in names], files) as folders:
        count = len(task.segments)
        yield folders[:count], folders[count] if task.quantiser else None


def draw_map(task: Task, place: Place, deleted: np.ndarray, before: bytes | None) -> bytes:
    """The content of `map.parquet`."""
    needed = None if before is None else (segments.IDS_FILE,)
    with _release(task, place, needed) as (folders, _), scratch("map") as work:
        ids = np.concatenate([np.load(folder / segments.IDS_FILE, mmap_mode="r") for folder in folders])
        if before is not None:
            table = pq.read_table(pa.BufferReader(before))
            gone = np.isin(table.column("id").to_numpy(), ids[deleted])
            pq.write_table(table.filter(pa.array(~gone)), work / MAP_FILE, compression="zstd")
        else:
            live = np.ones(len(ids), bool)
            live[deleted] = False
            rows = _SegmentRows([ann.RowStore(folder / ann.VECTORS_FILE).rows for folder in folders])
            write_map(work, ids, ItemsTable(folders).groups("uri"), rows, live)  # type: ignore[arg-type]
        return (work / MAP_FILE).read_bytes()


class _SegmentRows:
    """The mapped rows of several segments, to be indexed by an ascending array of row numbers."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        edges = np.searchsorted(rows, self._starts)
        pieces = zip(self._parts, self._starts, edges, edges[1:], strict=False)
        return np.concatenate([part[rows[low:high] - start] for part, start, low, high in pieces])
