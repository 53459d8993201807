"""One release searched in pieces: its segments lie with several searchers, which may be processes on other nodes.

The coarse search is done once, every shard scans the lists it was told (of its own segments) and compares its own
candidates exactly, and the k best of all shards are the k best of the release: what one index over all segments finds
is found here as well, as each segment is searched in the same way wherever it lies. How a shard is reached is up to
the transport, which calls `Shard.search` with these arguments and gives back what it returns.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audiomae.search.index import Quantiser
from audiomae.search.searcher import Nearest, Searcher, best
from audiomae.search.spec import IndexSpec

Transport = Callable[[np.ndarray, int, Nearest | None], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Shard:
    """Some segments of a release.

    Attributes:
        searcher: over them.
        start: the number of their first row in the release.
    """

    searcher: Searcher
    start: int

    @classmethod
    def open(cls, directories: Sequence[Path], trained: Path | None, spec: IndexSpec, start: int) -> "Shard":
        """Open consecutive segments whose files were checked; `start` is the first of their rows."""
        return cls(Searcher.open(directories, trained, spec), start)

    def search(self, queries: np.ndarray, k: int, nearest: Nearest | None) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of this shard: scores float32[Q, k] and rows int64[Q, k] of the release, -1 padded.

        Args:
            queries: float32[Q, D], unit length.
            k: how many.
            nearest: similarities and numbers of the lists to scan, from `Quantiser.nearest`; None for kinds without.
        """
        scores, rows = self.searcher.search(queries, k, nearest=nearest)
        return scores, np.where(rows < 0, -1, rows + self.start)


class ShardedSearcher:
    """Searches all shards of a release at once.

    Args:
        shards: how to call each; the order does not matter.
        spec: of the release.
        quantiser: of the release, where it has one.
    """

    def __init__(self, shards: Sequence[Transport], spec: IndexSpec, quantiser: Quantiser | None) -> None:
        self._shards, self._spec, self._quantiser = list(shards), spec, quantiser
        self._threads = ThreadPoolExecutor(len(self._shards), thread_name_prefix="shard")

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows of each query: scores float32[Q, k] and rows int64[Q, k], -1 padded."""
        nearest = self._quantiser.nearest(queries, self._spec.nprobe) if self._quantiser else None
        waiting = [self._threads.submit(shard, queries, k, nearest) for shard in self._shards]
        return best([call.result() for call in waiting], k)
