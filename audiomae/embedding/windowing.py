"""Windows that fit: their length follows the lengths of the corpus' files and what the encoder was made for."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from audiomae.corpus.decode import probe
from audiomae.corpus.manifest import open_source

PROBED_FILES = 64
TYPICAL = 0.9  # share of the files that must fit for one window to hold a whole file
WHOLE_FILE_S = 10.0  # a file up to this long is one sound to most listeners, and one answer
PROBE_THREADS = 8


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


def sampled_durations(root: str, listing: pa.Table, most: int = PROBED_FILES) -> list[float]:
    """Seconds of audio, by their headers, of up to `most` files spread evenly over the listing (of those that open)."""
    rows = listing.take(pa.array(np.unique(np.linspace(0, listing.num_rows - 1, most).astype(np.int64)))).to_pylist()

    def duration(row: dict) -> float | None:
        try:
            return probe(open_source(root, row["uri"], row.get("tar_offset"), row.get("size"))).duration_s
        except Exception:  # storage clients raise what they like; the file fails with its reason when it is embedded
            return None

    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        return [seconds for seconds in pool.map(duration, rows) if seconds]
