"""Opening whatever somebody calls an audio file, and keeping it within limits while it is read.

`opened` gives a reader (`readers.py`) behind a guard: every block that comes out was checked for time, length and sane
samples, and every way to fail is a `DecodeError` with a stable class.
"""

import errno
import io
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from audiomae.config import StrictConfig
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
from audiomae.corpus.sources import open_source
from audiomae.errors import DecodeError

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


class GuardedReader:
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
def opened(source: Any, limits: DecodeLimits) -> Iterator[GuardedReader]:
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
            yield GuardedReader(reader, limits, fault)
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
        with _binary(open_source("", source)) as found:
            yield found
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
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise DecodeError("open", f"{path}: a symbolic link that leads back to itself", "NotFound") from None
        raise DecodeError("open", f"{path}: {error}", "ReadFailed") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise DecodeError("open", f"{path}: {kind}", "NotAFile")
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor, not a path)
        yield file
