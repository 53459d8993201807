"""What a request asks for and what it is answered with, in plain values; neither the model nor the index is loaded."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audiomae.config import nearest
from serve.problems import Problem
from serve.schema import Group, Timing

SMALL = 1e-200  # a sum of squares above this has lost nothing
FILTER_HINT = 'expected {"column": value | {"in": [...]} | {"gte": x, "lt": y}}'


@dataclass(frozen=True)
class EncoderInfo:
    """What a caller must know to prepare windows for an encoder: rate in Hz, window in seconds, vector length."""

    fingerprint: str
    sample_rate: int
    window_s: float
    dim: int
    device: str
    text_reason: str | None
    """Why it cannot embed text; `None` when it can."""


@dataclass(frozen=True)
class Region:
    """A stretch of a file, in seconds; `None` is its start or its end."""

    start_s: float | None = None
    end_s: float | None = None

    def __bool__(self) -> bool:
        return self.start_s is not None or self.end_s is not None


WHOLE = Region()


@dataclass(frozen=True)
class Sound:
    """A sound to search with: the bytes of an upload, or an item of the index; and the stretch of it that counts."""

    data: bytes = b""
    clip: int | None = None
    region: Region = WHOLE


@dataclass
class Mixed:
    """Several sounds, vectors and words as one query."""

    include: list[Sound | np.ndarray] = field(default_factory=list)
    exclude: list[Sound | np.ndarray] = field(default_factory=list)
    text: str | None = None

    @property
    def clips(self) -> set[int]:
        """Ids of the items that are examples: they are no hits."""
        sounds = (sound for sound in (*self.include, *self.exclude) if isinstance(sound, Sound))
        return {sound.clip for sound in sounds if sound.clip is not None}


@dataclass(frozen=True)
class Wanted:
    """The answer that a query wants: how many hits, through which filter, windows or files, duplicates or not.

    With `by_window` like any window of the sound, else like all of it.
    """

    k: int = 10
    filter: str | dict[str, Any] | None = None
    group: Group = "file"
    collapse: bool = False
    by_window: bool = False


@dataclass
class Answer:
    """What a query is answered with.

    Attributes:
        release: the version that answered, first to last.
        results: hits of each query vector: a list of JSON-ready dicts, or that list as JSON.
        timing: where the time went.
        missing: shards of the index that did not answer.
    """

    release: str
    results: list[Any]
    timing: Timing = field(default_factory=Timing)
    missing: Sequence[str] = ()


@dataclass
class Embedded:
    """Vectors float32[W, dim] of a sound's windows, where they lie in it (seconds), and where the time went."""

    vectors: np.ndarray
    spans: list[tuple[float, float]]
    timing: Timing = field(default_factory=Timing)


def check_filter(given: str | dict[str, Any] | None, columns: Sequence[str]) -> dict[str, Any] | None:
    """Parse a filter and check its columns; the index checks the conditions against the columns' types.

    Args:
        given: a JSON text (from a form or a query string), an object (from a JSON body), or nothing.
        columns: names that may be filtered on.

    Returns:
        The filter as plain Python values, `None` when there is none.

    Raises:
        Problem: 422 `bad_filter`, or 422 `unknown_column` naming the nearest column.
    """
    if given is None or given == "" or given == {}:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise Problem(422, "bad_filter", f"filter is not JSON ({error}); {FILTER_HINT}") from None
    if not isinstance(given, dict):
        raise Problem(422, "bad_filter", f"filter is a {type(given).__name__}; {FILTER_HINT}")
    for column, condition in given.items():
        if column not in columns and not (column == "any" and isinstance(condition, list)):
            raise Problem(422, "unknown_column", f"filter: no column {column!r}{nearest(column, columns)}")
    return given


def check_vectors(vectors: Any, dim: int, limit: int) -> np.ndarray:
    """Query vectors as unit float32[Q, dim]; 422 when they are not numbers, too many, of another length, or zero."""
    if not isinstance(vectors, list) or not vectors:
        raise Problem(422, "invalid_request", "vectors: expected a list of one or more vectors")
    if len(vectors) > limit:
        raise Problem(422, "too_many_vectors", f"{len(vectors)} vectors; at most {limit} in one call")
    for row, vector in enumerate(vectors):
        if not isinstance(vector, list):
            raise Problem(422, "invalid_request", f"vectors[{row}]: expected a list of numbers")
        if len(vector) != dim:
            detail = f"vectors[{row}] has {len(vector)} numbers; this index needs {dim}"
            raise Problem(422, "vector_dim_mismatch", detail, expected=dim, got=len(vector))
        if not set(map(type, vector)) <= {int, float}:
            raise Problem(422, "invalid_request", f"vectors[{row}]: expected numbers only")
    try:
        queries = np.array(vectors, np.float64)
    except (OverflowError, ValueError):
        raise Problem(422, "invalid_request", "vectors: a number is too large") from None
    return unit(queries)


def unit(queries: np.ndarray) -> np.ndarray:
    """Rows of float[Q, dim] as unit float32; 422 when one is not finite or has no direction."""
    queries = np.asarray(queries, np.float64)
    squares = np.vecdot(queries, queries)
    if not all(SMALL < square < math.inf for square in squares.tolist()):  # not true of NaN
        peaks = np.abs(queries).max(axis=1, keepdims=True)
        if not np.isfinite(peaks).all():
            raise Problem(422, "invalid_request", "vectors: every number must be finite")
        if not peaks.all():
            detail = f"vectors[{int(np.argmin(peaks[:, 0]))}] is all zeros and has no direction"
            raise Problem(422, "zero_vector", detail)
        queries = queries / peaks  # so that no square overflows or vanishes
        squares = np.vecdot(queries, queries)
    return (queries / np.sqrt(squares)[:, None]).astype(np.float32)


def milliseconds(began: float) -> float:
    """Since `began`, of `time.perf_counter()`."""
    return (time.perf_counter() - began) * 1000
