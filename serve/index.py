"""The index deployment: vectors in, ranked items out."""

import datetime
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from audiomae.search import release as releases
from audiomae.search.index import AudioIndex, Hits
from serve.schema import ServeArgs
from serve.versions import VersionCache

NOT_METADATA = ("id", "uri", "start_s", "end_s", "corpus")


@dataclass(frozen=True)
class IndexInfo:
    """What a caller must know about an opened release."""

    version: str
    fingerprint: str
    rows: int
    dim: int
    columns: tuple[str, ...]
    window_s: float | None


@dataclass(frozen=True)
class Ranked:
    """One hit: `row` is the items table's row as JSON-ready values, `query` the row number of its query vector."""

    row: dict[str, Any]
    score: float
    query: int


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


def metadata(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that came with the corpus."""
    return {name: value for name, value in row.items() if name not in NOT_METADATA}


def plain(value: Any) -> Any:
    """`value` as something JSON can hold: NaN becomes null, dates ISO text, bytes their length in words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, bool | int | str) else str(value)
