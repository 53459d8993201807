"""The index deployment: vectors in, ranked items out."""

from typing import Any

import numpy as np

from audiomae.artifacts import releases as releases
from audiomae.search.audio_index import AudioIndex
from audiomae.search.hits import Hits
from serve.records import IndexInfo, Ranked, plain
from serve.schema import ServeArgs
from serve.versions import VersionCache


class Index:
    """Holds the serving release's index (two of them while releases are being swapped). Every call names its release.

    Opening checks every checksum before a byte reaches the index library.
    """

    def __init__(self, args: ServeArgs, version: str) -> None:
        self._args = args
        self._indexes: VersionCache[AudioIndex] = VersionCache(self._open)
        self._indexes.get(version)

    def resolve(self, version: str) -> str:
        """The concrete version that `version` ("latest" or a name) means now."""
        return str(releases.resolve(self._args.index, version).version)

    def load(self, version: str) -> IndexInfo:
        """Make release `version` ready and describe it.

        Raises:
            IntegrityError: when a file of the release is not what its receipt says.
        """
        index = self._indexes.get(version)
        return IndexInfo(
            version=index.version,
            fingerprint=index.fingerprint,
            rows=len(index),
            dim=index.dim,
            columns=tuple(column for column in index.columns if column != "corpus"),
            window_s=index.release.info["corpora"][0].get("window_s"),
        )

    def search(self, version: str, vectors: np.ndarray, k: int, filter: dict[str, Any] | None) -> list[list[Ranked]]:
        """For each of Q unit vectors float32[Q, dim] its at most `k` best items, best first.

        Raises:
            FilterError: a filter that does not fit the items table.
        """
        return ranked(self._indexes.get(version).search(vectors, k=k, filter=filter))

    def similar(self, version: str, clip: int, k: int, filter: dict[str, Any] | None) -> list[Ranked] | None:
        """The at most `k` items nearest to item `clip`, itself excluded; `None` when there is no such item."""
        try:
            return ranked(self._indexes.get(version).search_id(clip, k=k, filter=filter))[0]
        except KeyError:
            return None

    def item(self, version: str, clip: int) -> tuple[dict[str, Any], str] | None:
        """The items table's row of `clip` as JSON-ready values, and the root of the corpus it is in."""
        index = self._indexes.get(version)
        try:
            row = index.item(clip)
        except KeyError:
            return None
        return plain(row), index.corpus_root(row)

    def _open(self, version: str) -> AudioIndex:
        return AudioIndex.open(self._args.index, version=version)


def ranked(hits: Hits) -> list[list[Ranked]]:
    """The hits of each query without the padding. Rounding can lift a cosine over 1: cut there."""
    return [
        [Ranked(plain(row), min(1.0, float(score)), query) for row, score in zip(items, scores, strict=False)]
        for query, (items, scores) in enumerate(zip(hits.items, hits.scores, strict=True))
    ]
