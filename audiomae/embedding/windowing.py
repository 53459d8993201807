"""Windows that fit: their length follows the lengths of the corpus' files and what the encoder was made for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TYPICAL = 0.9  # share of the files that must fit for one window to hold a whole file
WHOLE_FILE_S = 10.0  # a file up to this long is one sound to most listeners, and one answer


class Windowing(NamedTuple):
    """Window length and distance between window starts, in seconds, and why."""

    window_s: float
    hop_s: float
    reason: str


def fitting_windows(durations_s: Sequence[float], encoder_window_s: float) -> Windowing:
    """Windows for a corpus of which a sample of files has these lengths.

    Where nine of ten files last at most `WHOLE_FILE_S` (or one and a half encoder windows), one window holds a whole
    file; else windows are the encoder's own, and the last one of a file is moved back to be whole.
    """
    own = round(encoder_window_s, 6)
    if not len(durations_s):
        return Windowing(own, own, f"the encoder's own {own:g} s (no file's length could be read)")
    lengths = np.sort(np.asarray(durations_s, np.float64))
    limit = max(WHOLE_FILE_S, 1.5 * own)
    fitting = lengths[lengths <= limit + 0.05]
    if len(fitting) < TYPICAL * len(lengths):
        return Windowing(
            own, own, f"the encoder's own {own:g} s (files last {lengths[len(lengths) // 2]:.1f} s in the middle)"
        )
    window = max(own, round(float(fitting[-1]), 1))
    return Windowing(window, window, f"one window holds a whole file (of {len(lengths)} looked at, up to {window:g} s)")
