"""Any audio file -> mono float32 at the rate an encoder wants, whole or as sample-accurate windows, in bounded memory.

The decoder is chosen by content: libsndfile first, FFmpeg for what it does not know or cannot read to its end
(`opening.py`). Channels become one in `mixing.py`. The one resampler of the product is soxr at quality HQ.

Times are the file's own: where packets are lost the rest keeps its place, with silence between, and a sound track that
begins after the picture has its first window there. A `DecodeReport` takes down what was lost.

Windows agree with the whole. With the reduced ratio L / M of output to input rate, output sample `k * L` lies exactly
on input frame `k * M`. Every piece that is resampled starts on such a frame, with `MARGIN_SAMPLES` of the lower rate on
both sides (the HQ filter reaches about 100), so a window read alone equals the slice of the whole file's resampled
decode to 1e-5, wherever it starts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import soxr

from audiomae.corpus.damage import DecodeReport, LostSpan, is_heard, refuse
from audiomae.corpus.opening import DEFAULT_LIMITS, DecodeLimits, GuardedReader, opened
from audiomae.corpus.readers import AudioInfo
from audiomae.errors import DecodeError

__all__ = [
    "AudioInfo",
    "DecodeError",
    "DecodeLimits",
    "DecodeReport",
    "LostSpan",
    "Window",
    "decode",
    "iter_windows",
    "probe",
]

PIECE_S = 20.0
MARGIN_SAMPLES = 256
LastWindow = Literal["partial", "whole"]
CANCELS = "stereo cancels: mixed as the difference of its channels"


@dataclass(frozen=True)
class Window:
    """A stretch of a file: float32[S] mono samples and where they lie, in seconds. The last one may be short."""

    start_s: float
    end_s: float
    samples: np.ndarray
    note: str | None = None
    """What a reader of its vector has to know of how it came about."""


def probe(source: Any, limits: DecodeLimits = DEFAULT_LIMITS) -> AudioInfo:
    """What a file's header says, without decoding: rate, channels, length, codec, whether seeking into it is cheap.

    Args:
        source: a local path, an `s3://` URI, the file's bytes, or a seekable binary file.

    Raises:
        DecodeError: the file cannot be opened as audio, or is outside the limits.
    """
    with opened(source, limits) as file:
        return file.info


def decode(
    source: Any,
    sample_rate: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
    report: DecodeReport | None = None,
) -> np.ndarray:
    """Mono samples, float32[S], of the whole file or of a window of it.

    Args:
        source: a local path, an `s3://` URI, the file's bytes, or a seekable binary file.
        sample_rate: of the result, in Hz.
        start_s: where to start, in the file's time; rounded to a sample of the result.
        duration_s: how much to read; less comes back where the file ends. `None` reads to the end.
        report: takes down what was lost (there is silence in its place) and where stereo cancels.

    Raises:
        DecodeError: with stage, stable class and reason.
    """
    longest = round(limits.max_clip_s * sample_rate)
    pieces: list[np.ndarray] = []
    count = 0
    with opened(source, limits, report) as file:
        first = round(start_s * sample_rate) - round(file.origin_s * sample_rate)
        last = None if duration_s is None else max(0, first + round(duration_s * sample_rate))
        first = max(0, first)
        for piece in _resampled(file, sample_rate, first, last):
            pieces.append(piece)
            count += len(piece)
            if count > longest:
                raise DecodeError(
                    "limits", f"more than {limits.max_clip_s:g} s in one piece: read it by windows", "TooLong"
                )
        lost = file.report.lost
        ratio = file.info.sample_rate / sample_rate
        heard = not file.silences or is_heard(file.silences, first * ratio, (first + count) * ratio)
    if not heard:
        raise refuse(lost[0])
    if not count:
        raise DecodeError("decode", f"no audio from second {start_s:g} on", "NoAudio")
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def iter_windows(  # noqa: PLR0913 (independent options of one call)
    source: Any,
    sample_rate: int,
    window_s: float,
    hop_s: float,
    start_s: float = 0.0,
    end_s: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
    last_window: LastWindow = "partial",
    report: DecodeReport | None = None,
) -> Iterator[Window]:
    """The windows of a file in one forward pass, in memory that does not depend on its length.

    Windows start at `start_s` (or where the sound sets in, if that is later) and every `hop_s`; those that start before
    `end_s` are given, each whole even where it reaches past `end_s`. So a file cut into segments at multiples of
    `hop_s` gives the same windows as the file in one go. What is left after the last whole window is kept if it would
    fill at least half a window and is not covered by the one before: cut short (`partial`), or moved back until it is
    whole (`whole`). A file shorter than a window gives its one window. A window of which 99% was lost is left out.

    Args:
        source: a local path, an `s3://` URI, the file's bytes, or a seekable binary file.
        sample_rate: of the samples, in Hz.
        window_s: window length; rounded to samples.
        hop_s: distance between window starts; rounded to samples.
        start_s: first window's start.
        end_s: no window starts here or later; `None` goes to the end of the file.
        last_window: what becomes of a rest at the end of the file.
        report: takes down what was lost and where stereo cancels, by the time a window beyond it is given.

    Raises:
        DecodeError: possibly after some windows; the caller drops or keeps those.
    """
    size, hop = round(window_s * sample_rate), round(hop_s * sample_rate)
    if size < 1 or hop < 1:
        raise ValueError(f"window_s and hop_s must be at least one sample, got {window_s} and {hop_s}")
    report = report if report is not None else DecodeReport()
    given = False
    with opened(source, limits, report) as file:
        origin = round(file.origin_s * sample_rate)
        first = max(0, round(start_s * sample_rate) - origin)
        stop = None if end_s is None else round(end_s * sample_rate) - origin
        last = None if stop is None else first + max(0, math.ceil((stop - first) / hop) - 1) * hop + size
        if stop is not None and stop <= first:
            return
        ratio = sample_rate / file.info.sample_rate
        pieces = _resampled(file, sample_rate, first, last)
        for begin, samples in _slide(pieces, first, size, hop, stop, last_window == "whole"):
            end = begin + len(samples)
            if file.silences and not is_heard(file.silences, begin / ratio, end / ratio):
                continue
            given = True
            start_s, end_s = file.origin_s + begin / sample_rate, file.origin_s + end / sample_rate
            note = CANCELS if report.cancels_in(start_s, end_s) else None
            yield Window(start_s, end_s, samples, note)
    if not given and first == 0:
        raise refuse(report.lost[0]) if report.lost else DecodeError("decode", "the file holds no samples", "NoAudio")


def _slide(
    pieces: Iterator[np.ndarray], first: int, size: int, hop: int, stop: int | None, whole: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, float32[<=size]) of each window over contiguous pieces that begin at sample `first`."""
    held = size if whole else 0  # samples before the next window that a last one may reach back to
    buffer = np.empty(0, np.float32)
    base = begin = first  # of the buffer, of the next window
    for piece in pieces:
        keep = min(max(0, begin - held - base), len(buffer))
        buffer, base = np.concatenate([buffer[keep:], piece]) if len(buffer) > keep else piece, base + keep
        while begin + size <= base + len(buffer) and (stop is None or begin < stop):
            yield begin, buffer[begin - base : begin - base + size].copy()
            begin += hop
    end = base + len(buffer)
    if begin >= end or (stop is not None and begin >= stop):
        return
    covered = begin > 0 and begin - hop + size >= end
    if begin == 0 or (not covered and 2 * (end - begin) >= size):
        begin = max(base, min(begin, end - held)) if whole else begin
        yield begin, buffer[begin - base :].copy()


def _resampled(file: GuardedReader, sample_rate: int, first: int, last: int | None) -> Iterator[np.ndarray]:
    """Output samples [first, last) in contiguous pieces; each piece is one call of soxr on aligned input."""
    rate = file.info.sample_rate
    if rate == sample_rate:
        yield from file.blocks(first, last)
        return
    divisor = math.gcd(rate, sample_rate)
    out_step, in_step = sample_rate // divisor, rate // divisor
    margin = math.ceil(MARGIN_SAMPLES * max(1.0, rate / sample_rate) / in_step) * in_step
    piece = math.ceil(PIECE_S * sample_rate / out_step)  # in steps
    step = first // out_step
    last_step = None if last is None else -(-last // out_step)
    low = max(0, step * in_step - margin)
    stop = None if last_step is None else last_step * in_step + margin
    native = _Cursor(file.blocks(low, stop), low)
    while last_step is None or step < last_step:
        until = step + piece if last_step is None else min(step + piece, last_step)
        low = max(0, step * in_step - margin)
        samples, ended = native.take(low, until * in_step + margin)
        origin = low // in_step * out_step  # the output sample that the first of `samples` lies on
        out = soxr.resample(samples, rate, sample_rate, "HQ") if len(samples) else samples
        begin = max(first, step * out_step) - origin
        end = len(out) if ended and last is None else min(len(out), until * out_step - origin)
        if last is not None:
            end = min(end, last - origin)
        if end > begin:
            yield out[begin:end]
        if ended:
            return
        step = until


class _Cursor:
    """Contiguous blocks of native frames, read forward, looked at through overlapping ranges."""

    def __init__(self, blocks: Iterator[np.ndarray], start: int) -> None:
        self._blocks, self._start = blocks, start
        self._held: list[np.ndarray] = []
        self._count = 0

    def take(self, low: int, high: int) -> tuple[np.ndarray, bool]:
        """The frames [low, high) as far as there are any, and whether the file ended inside; drops those before low."""
        ended = False
        while self._start + self._count < high:
            block = next(self._blocks, None)
            if block is None:
                ended = True
                break
            self._held.append(block)
            self._count += len(block)
        joined = self._held[0] if len(self._held) == 1 else np.concatenate(self._held or [np.empty(0, np.float32)])
        joined = joined[max(0, low - self._start) :]
        self._start = max(self._start, low)
        self._held, self._count = [joined], len(joined)
        return joined[: high - low], ended
