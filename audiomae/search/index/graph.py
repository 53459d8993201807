"""An HNSW graph over one segment."""

from pathlib import Path

import faiss
import numpy as np

from audiomae.search.index.encoding import ADD_BATCH
from audiomae.search.index.lists import Selection
from audiomae.search.index.store import read_index
from audiomae.vectors import widened

INDEX_FILE = "index.faiss"


class Graph:
    """One segment's HNSW graph, in memory.

    Args:
        path: `index.faiss`, checked.
    """

    def __init__(self, path: Path) -> None:
        self._index = read_index(path)

    def search(
        self, queries: np.ndarray, k: int, effort: int, selection: Selection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows: approximate scores float32[Q, k] and rows int64[Q, k]."""
        selector = None if selection is None else faiss.IDSelectorBitmap(selection.bits)
        params = faiss.SearchParametersHNSW(sel=selector, efSearch=max(effort, k))
        found: tuple[np.ndarray, np.ndarray] = self._index.search(queries, k, params=params)
        return found


def build_graph(factory: str, rows: np.ndarray, out: Path) -> None:
    """Build the graph of one segment from row-store vectors float16[N, D]."""
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    sample = rows[:: max(1, len(rows) // 65_536)]
    index.train(widened(sample))
    for start in range(0, len(rows), ADD_BATCH):
        index.add(widened(rows[start : start + ADD_BATCH]))
    faiss.write_index(index, str(out))
