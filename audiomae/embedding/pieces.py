"""What the decoding of a work item yields, piece by piece: windows to embed, silent windows, damaged spans."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 64


class Clip(NamedTuple):
    """One window on its way to the encoder: float32 samples `[S]`, or int16 with the factors that restore them.

    `scales` float32 `[ceil(S / 64)]`: one for each `BLOCK` of samples (`payload.quantise`). `note` goes into the row.
    """

    start_s: float
    end_s: float
    samples: np.ndarray
    scales: np.ndarray | None = None
    note: str | None = None


class Silent(NamedTuple):
    """A window that is left out because nothing can be heard in it: a row of `silent/`.

    `peak_db` is its peak in dBFS. One that comes after the `Clip` of the same start takes that back.
    """

    start_s: float
    end_s: float
    reason: str
    peak_db: float


class Damage(NamedTuple):
    """A span of an item that gave no samples while the rest of it did: a row of `failures/` of kind `damaged`."""

    start_s: float
    end_s: float | None
    stage: str
    error_class: str
    message: str


Piece = Clip | Silent | Damage
PIECES: dict[str, Callable[..., Piece]] = {kind.__name__: kind for kind in (Clip, Silent, Damage)}
