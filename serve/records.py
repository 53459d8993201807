"""What the deployments tell each other, in plain values; this module loads neither the model nor the index library."""

import datetime
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NOT_METADATA = ("id", "uri", "start_s", "end_s", "corpus")


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
