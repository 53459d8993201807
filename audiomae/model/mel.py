"""A mel filter bank that is the same, bit for bit, on every machine.

torchaudio computes it with vector instructions whose last digits differ from one CPU to another. A triangle that
barely touches an FFT bin takes a weight out of the difference of two such numbers, and a log-mel cell then differs by
2e-4. Here every step is rounded to float32 from double precision, which all machines do alike; the official AudioMAE++
features come out to 1e-6.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def htk_bank(bins: int, f_min: float, f_max: float, bands: int, sample_rate: int) -> Array:
    """Triangles evenly spaced on the HTK mel scale: float32[bins, bands], as `torchaudio.functional.melscale_fbanks`.

    Args:
        bins: of the spectrum, from 0 Hz to half the sample rate.
        f_min, f_max: Hz where the first triangle begins and the last one ends.
    """
    hz = _linspace(0, sample_rate // 2, bins)
    mels = _linspace(_htk_mel(f_min), _htk_mel(f_max), bands + 2)
    powers = np.power(10.0, (mels / np.float32(2595)).astype(np.float64)).astype(np.float32)
    corners = np.float32(700) * (powers - np.float32(1))
    widths, slopes = np.diff(corners), corners - hz[:, None]
    return np.maximum(0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))


def _linspace(first: float, last: float, count: int) -> Array:
    """As torch counts in float32: from the first up to the middle, from the last down to it, each rounded once."""
    start, end = np.float32(first), np.float32(last)
    step, index = np.float64((end - start) / np.float32(count - 1)), np.arange(count)
    values = np.where(index < count // 2, start + step * index, end - step * (count - 1 - index))
    return values.astype(np.float32)


def _htk_mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)
