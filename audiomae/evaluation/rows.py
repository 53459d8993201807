"""The rows an evaluation is about: vectors with a label, and where in the corpus each comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from audiomae.artifacts.embeddings import RESERVED_COLUMNS, EmbeddingSet, column_to_vectors
from audiomae.config import nearest
from audiomae.errors import ColumnError
from audiomae.evaluation.protocol import Level
from audiomae.vectors import clip_vectors, normalised


@dataclass(frozen=True)
class LabelledRows:
    """N labelled vectors of one run. Row i of every array is one clip, or one window of it.

    ``vectors`` float32[N, D] L2-normalised; ``labels``, ``groups`` (None without one) and ``uris`` str[N]; ``spans``
    float64[N, 2] start and end in seconds; ``unlabelled`` counts the rows that were left out for want of a label.
    """

    name: str
    vectors: npt.NDArray[np.float32]
    labels: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_] | None
    uris: npt.NDArray[np.str_]
    spans: npt.NDArray[np.float64]
    corpus_root: str
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> list[tuple[str, float]]:
        """What names a row in any run over the same corpus: uri and start."""
        return list(zip(self.uris.tolist(), np.round(self.spans[:, 0], 6).tolist(), strict=True))

    def take(self, places: npt.NDArray[np.int64]) -> LabelledRows:
        """Only these rows, in this order."""
        return replace(
            self,
            vectors=self.vectors[places],
            labels=self.labels[places],
            groups=None if self.groups is None else self.groups[places],
            uris=self.uris[places],
            spans=self.spans[places],
        )

    def with_vectors(self, name: str, vectors: npt.ArrayLike) -> LabelledRows:
        """The same rows as another encoder sees them: float[N, D']."""
        return replace(self, name=name, vectors=normalised(np.asarray(vectors, np.float32)))


def read_rows(embeddings: EmbeddingSet, name: str, label: str, group: str | None, level: Level) -> LabelledRows:
    """The labelled rows of an embedding folder.

    Args:
        embeddings: the opened folder.
        name: what the report calls this run.
        label, group: manifest columns; values are compared as text.
        level: ``clip`` averages the windows of a file into one row, ``window`` keeps them.

    Raises:
        ColumnError: for a column that is not there, or a label column without a single value.
    """
    if not embeddings.num_rows:
        raise ColumnError(f"{embeddings.path}: holds no embedding; see its failures/ for the reasons")
    available = embeddings.column_names
    wanted = [column for column in (label, group) if column is not None]
    for column in wanted:
        if column not in available:
            own = [extra for extra in available if extra not in RESERVED_COLUMNS]
            raise ColumnError(f"{embeddings.path}: no column {column!r}" + nearest(column, own))
    table = embeddings.read(list(dict.fromkeys(["uri", "start_s", "end_s", "embedding", *wanted])))
    known = np.logical_and.reduce([table[column].is_valid().to_numpy() for column in wanted])
    if not known.any():
        raise ColumnError(f"{embeddings.path}: column {' or '.join(wanted)!r} is empty in all {table.num_rows} rows")
    unlabelled = int((~known).sum())
    table = table.filter(pa.array(known))
    rows = LabelledRows(
        name=name,
        vectors=normalised(column_to_vectors(table["embedding"])),
        labels=_text(table[label]),
        groups=None if group is None else _text(table[group]),
        uris=_text(table["uri"]),
        spans=np.stack([table["start_s"].to_numpy(), table["end_s"].to_numpy()], axis=1),
        corpus_root=embeddings.corpus_root,
        unlabelled=unlabelled,
    )
    return per_clip(rows) if level == "clip" else rows


def per_clip(rows: LabelledRows) -> LabelledRows:
    """One row per file: the normalised mean of its windows, spanning all of them, in the order of first appearance."""
    _, first, clip = np.unique(rows.uris, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    clip, first = rank[clip], np.sort(first)
    starts, ends = np.full(len(first), np.inf), np.full(len(first), -np.inf)
    np.minimum.at(starts, clip, rows.spans[:, 0])
    np.maximum.at(ends, clip, rows.spans[:, 1])
    return replace(rows.take(first), vectors=clip_vectors(rows.vectors, clip), spans=np.stack([starts, ends], axis=1))


def shared_rows(first: Sequence[Any], second: Sequence[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of the keys that both have, in the order of ``first``: two int64[M]."""
    places = {key: i for i, key in enumerate(second)}
    pairs = [(i, places[key]) for i, key in enumerate(first) if key in places]
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _text(column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    return np.array([str(value) for value in column.to_pylist()], dtype=np.str_)
