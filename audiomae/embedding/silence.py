"""Which windows hold no signal: too quiet by themselves, or beside the loudest window of their file.

A vector of silence is near every other silence and, with most encoders, near half the corpus (a hub), so a silent
window becomes a row of `silent/` instead of an embedding. The measure is the window's peak in dBFS (0 = full scale);
the absolute limit is by default that of FFmpeg's `silencedetect`.
"""

import math
from collections.abc import Iterator

import numpy as np

from audiomae.artifacts.tables import EmbedSettings
from audiomae.embedding.pieces import Clip, Silent

FLOOR_DB = -200.0  # of digital silence, so that the column holds finite numbers


def peak_db(samples: np.ndarray) -> float:
    """Largest magnitude of float32[S] in dBFS, to a hundredth; `FLOOR_DB` for zeros and for no samples at all."""
    peak = max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))
    return round(max(20 * math.log10(peak), FLOOR_DB), 2) if peak > 0 else FLOOR_DB


def hush(clips: Iterator[Clip], settings: EmbedSettings) -> Iterator[Clip | Silent]:
    """The windows of one item with the silent ones replaced by `Silent`.

    How loud an item gets is known at its end. A window that was let through by then and is too quiet beside a later one
    is taken back: its `Silent` follows after the last window.
    """
    floor, reach = settings.silence_db, settings.silence_range_db
    loudest = -math.inf
    passed: list[tuple[float, float, float]] = []
    for clip in clips:
        peak = peak_db(clip.samples)
        loudest = max(loudest, peak)
        if peak < floor:
            yield Silent(clip.start_s, clip.end_s, f"peak below {floor:g} dBFS", peak)
        elif peak < loudest - reach:
            yield Silent(clip.start_s, clip.end_s, _beside(reach), peak)
        else:
            passed.append((clip.start_s, clip.end_s, peak))
            yield clip
    for start_s, end_s, peak in passed:
        if peak < loudest - reach:
            yield Silent(start_s, end_s, _beside(reach), peak)


def _beside(reach: float) -> str:
    return f"peak more than {reach:g} dB below the loudest window of its file"
