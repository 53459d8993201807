"""Any audio file -> mono float32 at the rate an encoder wants, whole or as sample-accurate windows, in bounded memory.

The decoder is chosen by content: libsndfile first, FFmpeg for what it does not know (`readers.py`). Channels are
averaged. The one resampler of the product is soxr at quality HQ.

Windows agree with the whole. With the reduced ratio L / M of output to input rate, output sample `k * L` lies exactly
on input frame `k * M`. Every piece that is resampled starts on such a frame, with `MARGIN_SAMPLES` of the lower rate on
both sides (the HQ filter reaches about 100), so a window read alone equals the slice of the whole file's resampled
decode to 1e-5, wherever it starts.
"""

import io
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soxr

from audiomae.config import StrictConfig
from audiomae.corpus.errors import DecodeError
from audiomae.corpus.readers import (
    AudioInfo,
    AvReader,
    CorruptError,
    Reader,
    RecordingFile,
    SoundfileReader,
    UnreadableError,
    has_mp3_length,
    missing_data,
)

__all__ = ["AudioInfo", "DecodeError", "DecodeLimits", "Window", "decode", "iter_windows", "probe"]

PIECE_S = 20.0
MARGIN_SAMPLES = 256
MAX_AMPLITUDE = 1e6


class DecodeLimits(StrictConfig):
    """What one file may ask for. Time is CPU time of the decoding thread: a busy machine fails nothing."""

    min_sample_rate: int = 1_000
    max_sample_rate: int = 1_000_000
    max_channels: int = 128
    max_bytes: int = 64 << 30
    max_duration_s: float = 7 * 86_400.0
    """Of a file, declared or decoded."""
    max_clip_s: float = 3_600.0
    """Of one `decode` call, which holds its result in memory; windows have no such limit."""
    cpu_base_s: float = 30.0
    cpu_per_audio_s: float = 0.5
    """A file may cost `cpu_base_s` plus this much for each second of audio it has given."""
    allow_truncated: bool = False
    """Take what is there of a file that is shorter than its header says."""


DEFAULT_LIMITS = DecodeLimits()


@dataclass(frozen=True)
class Window:
    """A stretch of a file: float32[S] mono samples and where they lie, in seconds. The last one may be short."""

    start_s: float
    end_s: float
    samples: np.ndarray


def probe(source: Any, limits: DecodeLimits = DEFAULT_LIMITS) -> AudioInfo:
    """What a file's header says, without decoding: rate, channels, length, codec, whether seeking into it is cheap.

    Args:
        source: a local path, an `s3://` URI, the file's bytes, or a seekable binary file.

    Raises:
        DecodeError: the file cannot be opened as audio, or is outside the limits.
    """
    with _opened(source, limits) as opened:
        return opened.reader.info


def decode(
    source: Any,
    sample_rate: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Mono samples, float32[S], of the whole file or of a window of it.

    Args:
        source: a local path, an `s3://` URI, the file's bytes, or a seekable binary file.
        sample_rate: of the result, in Hz.
        start_s: where to start; rounded to a sample of the result.
        duration_s: how much to read; less comes back where the file ends. `None` reads to the end.

    Raises:
        DecodeError: with stage, stable class and reason.
    """
    first = round(start_s * sample_rate)
    last = None if duration_s is None else first + round(duration_s * sample_rate)
    longest = round(limits.max_clip_s * sample_rate)
    pieces: list[np.ndarray] = []
    count = 0
    with _opened(source, limits) as opened:
        for piece in _resampled(opened, sample_rate, first, last):
            pieces.append(piece)
            count += len(piece)
            if count > longest:
                raise DecodeError(
                    "limits", f"more than {limits.max_clip_s:g} s in one piece: read it by windows", "TooLong"
                )
    if not count:
        raise DecodeError("decode", f"no audio from second {start_s:g} on", "NoAudio")
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def iter_windows(
    source: Any,
    sample_rate: int,
    window_s: float,
    hop_s: float,
    start_s: float = 0.0,
    end_s: float | None = None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> Iterator[Window]:
    """The windows of a file in one forward pass, in memory that does not depend on its length.

    Windows start at `start_s`, `start_s + hop_s`, ...; those that start before `end_s` are given, each whole even where
    it reaches past `end_s`. So a file cut into segments at multiples of `hop_s` gives the same windows as the file in
    one go. The last window may be partial: it is kept if at least half full and not already covered by the one before;
    a file shorter than a window gives its one window.

    Args:
        source: a local path, an `s3://` URI, the file's bytes, or a seekable binary file.
        sample_rate: of the samples, in Hz.
        window_s: window length; rounded to samples.
        hop_s: distance between window starts; rounded to samples.
        start_s: first window's start.
        end_s: no window starts here or later; `None` goes to the end of the file.

    Raises:
        DecodeError: possibly after some windows; the caller drops or keeps those.
    """
    size, hop = round(window_s * sample_rate), round(hop_s * sample_rate)
    if size < 1 or hop < 1:
        raise ValueError(f"window_s and hop_s must be at least one sample, got {window_s} and {hop_s}")
    first = round(start_s * sample_rate)
    stop = None if end_s is None else round(end_s * sample_rate)
    last = None if stop is None else first + max(0, math.ceil((stop - first) / hop) - 1) * hop + size
    if stop is not None and stop <= first:
        return
    given = False
    with _opened(source, limits) as opened:
        for begin, samples in _slide(_resampled(opened, sample_rate, first, last), first, size, hop, stop):
            given = True
            yield Window(begin / sample_rate, (begin + len(samples)) / sample_rate, samples)
    if not given and first == 0:
        raise DecodeError("decode", "the file holds no samples", "NoAudio")


def _slide(
    pieces: Iterator[np.ndarray], first: int, size: int, hop: int, stop: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, float32[<=size]) of each window over contiguous pieces that begin at sample `first`."""
    buffer = np.empty(0, np.float32)
    base = begin = first  # of the buffer, of the next window
    for piece in pieces:
        keep = min(max(0, begin - base), len(buffer))
        buffer, base = np.concatenate([buffer[keep:], piece]) if len(buffer) > keep else piece, base + keep
        while begin + size <= base + len(buffer) and (stop is None or begin < stop):
            yield begin, buffer[begin - base : begin - base + size].copy()
            begin += hop
    end = base + len(buffer)
    if begin >= end or (stop is not None and begin >= stop):
        return
    covered = begin > 0 and begin - hop + size >= end
    if begin == 0 or (not covered and 2 * (end - begin) >= size):
        yield begin, buffer[begin - base :].copy()


def _resampled(opened: "_Opened", sample_rate: int, first: int, last: int | None) -> Iterator[np.ndarray]:
    """Output samples [first, last) in contiguous pieces; each piece is one call of soxr on aligned input."""
    rate = opened.reader.info.sample_rate
    if rate == sample_rate:
        yield from opened.blocks(first, last)
        return
    divisor = math.gcd(rate, sample_rate)
    out_step, in_step = sample_rate // divisor, rate // divisor
    margin = math.ceil(MARGIN_SAMPLES * max(1.0, rate / sample_rate) / in_step) * in_step
    piece = math.ceil(PIECE_S * sample_rate / out_step)  # in steps
    step = first // out_step
    last_step = None if last is None else -(-last // out_step)
    low = max(0, step * in_step - margin)
    stop = None if last_step is None else last_step * in_step + margin
    native = _Cursor(opened.blocks(low, stop), low)
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


class _Opened:
    """A reader with the limits kept: every block is checked for time, length and sanity on its way out."""

    def __init__(self, reader: Reader, limits: DecodeLimits, fault: Callable[[], Exception | None]) -> None:
        self.reader, self._limits, self._fault = reader, limits, fault

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """`Reader.blocks`, checked."""
        info, limits = self.reader.info, self._limits
        source = self.reader.blocks(start, stop)
        position, spent = start, 0.0
        while True:
            began = time.thread_time()
            try:
                block = next(source, None)
            except CorruptError as error:
                self._raise_fault()
                raise DecodeError("decode", f"{info.codec}: {error}", "CorruptAudio") from None
            self._raise_fault()
            spent += time.thread_time() - began
            if block is None:
                break
            _check_samples(block, position / info.sample_rate)
            position += len(block)
            seconds = position / info.sample_rate
            if seconds > limits.max_duration_s:
                raise DecodeError("limits", f"longer than {limits.max_duration_s:g} s", "TooLong")
            if spent > limits.cpu_base_s + limits.cpu_per_audio_s * seconds:
                raise DecodeError("limits", f"{spent:.0f} s of CPU for {seconds:.1f} s of audio", "TooSlow")
            yield block
        if stop is None or position < stop:
            self._check_length(max(position, start), stop)

    def _check_length(self, position: int, stop: int | None) -> None:
        """The file ended at `position`: did its header promise more?"""
        info = self.reader.info
        promised = info.num_frames
        if promised is None or not self.reader.length_is_promised or self._limits.allow_truncated:
            return
        expected = promised if stop is None else min(promised, stop)
        if expected - position > max(0.02 * promised, 0.1 * info.sample_rate):
            raise DecodeError(
                "decode",
                f"{info.codec}: the header declares {promised / info.sample_rate:.2f} s, "
                f"samples end at {position / info.sample_rate:.2f} s",
                "TruncatedFile",
            )

    def _raise_fault(self) -> None:
        if fault := self._fault():
            raise DecodeError("read", f"{type(fault).__name__}: {fault}", "ReadFailed")


def _check_samples(block: np.ndarray, at_s: float) -> None:
    if not len(block):
        return
    low, high = float(block.min()), float(block.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DecodeError("samples", f"NaN or infinite samples after second {at_s:.2f}", "NonFiniteSamples")
    if max(-low, high) > MAX_AMPLITUDE:
        raise DecodeError(
            "samples",
            f"amplitude {max(-low, high):.1e} after second {at_s:.2f}; full scale is 1",
            "AmplitudeOutOfRange",
        )


@contextmanager
def _opened(source: Any, limits: DecodeLimits) -> Iterator[_Opened]:
    """Open with whichever reader knows the content; `DecodeError` for everything that can go wrong with it."""
    with _binary(source) as (target, file, size):
        if size == 0:
            raise DecodeError("open", "the file is empty (0 bytes)", "EmptyFile")
        if size > limits.max_bytes:
            raise DecodeError("limits", f"{size} bytes; at most {limits.max_bytes}", "TooLarge")
        recorder = target if isinstance(target, RecordingFile) else None

        def fault() -> Exception | None:
            return recorder.error if recorder else None

        try:
            missing = missing_data(file, size)
            if missing and not limits.allow_truncated:
                raise DecodeError("decode", missing, "TruncatedFile")
            reader = _open_reader(target, file)
        except OSError as error:
            raise DecodeError("read", str(error), "ReadFailed") from None
        except UnreadableError as error:
            if found := fault():
                raise DecodeError("read", f"{type(found).__name__}: {found}", "ReadFailed") from None
            raise DecodeError("open", f"not audio that can be read: {error}", "UnknownFormat") from None
        try:
            _check_info(reader.info, limits)
            yield _Opened(reader, limits, fault)
        finally:
            reader.close()


def _open_reader(target: Any, file: BinaryIO) -> Reader:
    try:
        file.seek(0)
        reader = SoundfileReader(target)
    except UnreadableError as first:
        file.seek(0)
        try:
            return AvReader(target)
        except UnreadableError as second:
            raise UnreadableError(f"libsndfile: {first}; FFmpeg: {second}") from None
    if not reader.is_mp3 or has_mp3_length(file):
        return reader
    reader.close()
    file.seek(0)
    return AvReader(target)


def _check_info(info: AudioInfo, limits: DecodeLimits) -> None:
    if not limits.min_sample_rate <= info.sample_rate <= limits.max_sample_rate:
        raise DecodeError(
            "limits",
            f"sample rate {info.sample_rate} Hz; accepted: {limits.min_sample_rate} to {limits.max_sample_rate} Hz",
            "RateOutOfRange",
        )
    if not 1 <= info.channels <= limits.max_channels:
        raise DecodeError(
            "limits", f"{info.channels} channels; accepted: 1 to {limits.max_channels}", "TooManyChannels"
        )
    if info.duration_s is not None and info.duration_s > limits.max_duration_s:
        raise DecodeError(
            "limits", f"the header declares {info.duration_s:.0f} s; at most {limits.max_duration_s:g} s", "TooLong"
        )
    if info.num_frames == 0:
        raise DecodeError("decode", "the file holds no samples", "NoAudio")


@contextmanager
def _binary(source: Any) -> Iterator[tuple[Any, Any, int]]:
    """(what the C libraries get, a file to sniff in, its size). Local paths stay paths: C reads them fastest."""
    if isinstance(source, bytes | bytearray | memoryview):
        file = io.BytesIO(source)
        yield file, file, len(source)
        return
    if isinstance(source, str) and "://" in source and not source.startswith("file://"):
        from audiomae.corpus.manifest import open_source

        with _binary(open_source("", source)) as opened:
            yield opened
        return
    if isinstance(source, str | os.PathLike):
        path = os.path.abspath(os.fspath(source).removeprefix("file://"))
        with _open_local(path) as local:
            yield path, local, os.fstat(local.fileno()).st_size
        return
    recorder = RecordingFile(source, getattr(source, "name", "stream"))
    size = recorder.seek(0, os.SEEK_END)
    recorder.seek(0)
    if recorder.error:
        raise DecodeError("read", f"{type(recorder.error).__name__}: {recorder.error}", "ReadFailed")
    yield recorder, recorder, size


@contextmanager
def _open_local(path: str) -> Iterator[BinaryIO]:
    try:  # non-blocking, so that a named pipe cannot hang the job
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        link = Path(path)
        reason = f"broken symbolic link to {link.readlink()}" if link.is_symlink() else "no such file"
        raise DecodeError("open", f"{path}: {reason}", "NotFound") from None
    except PermissionError:
        raise DecodeError("open", f"{path}: permission denied", "PermissionDenied") from None
    except (OSError, ValueError) as error:
        raise DecodeError("open", f"{path}: {error}", "ReadFailed") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise DecodeError("open", f"{path}: {kind}", "NotAFile")
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor, not a path)
        yield file
