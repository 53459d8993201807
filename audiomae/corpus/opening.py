"""Opening whatever somebody calls an audio file, and keeping it within limits while it is read.

`opened` gives a `GuardedReader`: mono blocks, every one checked for time, length and sane samples. What is damaged is
passed over and reported (or, with `on_damage="fail"`, is the end of it), and every way to fail is a `DecodeError` with
a stable class.

libsndfile reads what is whole. Where it cannot open a file, gives up midway, or would stop before the file's end,
FFmpeg reads on from the very frame.
"""

import errno
import io
import math
import os
import stat
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import Field

from audiomae.config import StrictConfig
from audiomae.corpus.damage import DecodeReport, LostSpan, OnDamage, refuse
from audiomae.corpus.ffmpeg import AvReader
from audiomae.corpus.files import Patched, RecordingFile
from audiomae.corpus.headers import Facts, format_name, has_mp3_frame, has_mp3_length, inspect
from audiomae.corpus.mixing import Pick, cell_frames, mix
from audiomae.corpus.read_as import CHANNEL
from audiomae.corpus.readers import AudioInfo, CorruptError, Reader, SoundfileReader, UnreadableError
from audiomae.corpus.sources import open_source
from audiomae.errors import DecodeError

MAX_AMPLITUDE = 1e6
LENGTH_SLACK_S = 0.01
"""A file may end this much before the length its header gives without being called damaged."""


class DecodeLimits(StrictConfig):
    """How to read, and what one file may ask for.

    Time is CPU time of the decoding thread: a busy machine fails nothing.
    """

    on_damage: OnDamage = "salvage"
    """`salvage` reads around what is damaged and reports it; `fail` fails the file."""
    gaps_fail: bool = True
    """With `fail`: whether a gap between timestamps is damage too, or the silence that a live recording has there."""
    channel: str = Field("mix", pattern=CHANNEL)
    """`mix` all channels to one, or take `left`, `right` or a number, counted from 0."""
    min_sample_rate: int = 1_000
    max_sample_rate: int = 3_000_000
    """DSD512 is decoded at 2.8 MHz."""
    max_channels: int = 128
    max_bytes: int = 64 << 30
    max_duration_s: float = 7 * 86_400.0
    """Of a file."""
    max_clip_s: float = 3_600.0
    """Of one `decode` call, which holds its result in memory; windows have no such limit."""
    cpu_base_s: float = 30.0
    cpu_per_audio_s: float = 0.5
    """A file may cost `cpu_base_s` plus this much for each second of audio it has given."""


DEFAULT_LIMITS = DecodeLimits()


class GuardedReader:
    """A reader with the limits kept: every block is mixed and checked for time, length and sanity on its way out."""

    def __init__(self, target: "_Target", limits: DecodeLimits, report: DecodeReport) -> None:
        self._target, self._limits, self.report = target, limits, report
        self._pick = Pick(limits.channel)
        self._rate = 1
        self.silences: list[tuple[int, int]] = []
        """Spans of native frames that hold silence for what was lost."""
        self.reader = self._open()
        self._rate = self.info.sample_rate
        self.origin_s = self.reader.origin_s

    @property
    def info(self) -> AudioInfo:
        return self.reader.info

    def _open(self) -> Reader:
        target, facts = self._target, self._target.facts
        if facts.joined:
            return AvReader(target.for_ffmpeg(), self._pick, self._lose)
        try:
            reader = SoundfileReader(target.for_libsndfile(), self._pick)
        except UnreadableError as first:
            try:
                return AvReader(target.for_ffmpeg(), self._pick, self._lose)
            except UnreadableError as second:
                raise UnreadableError(f"libsndfile: {first}; FFmpeg: {second}") from None
        if facts.empty or (reader.info.num_frames and (not reader.is_mp3 or has_mp3_length(target.file))):
            return reader
        try:
            other = AvReader(target.for_ffmpeg(), self._pick, self._lose)
        except UnreadableError:
            return reader
        reader.close()
        return other

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """Mono float32 of the native frames [start, stop); shorter where the file ends."""
        cell, low, high = cell_frames(self._rate), start, stop
        if self.info.channels != 1:  # cells are mixed whole, and each fades over from the one before
            low = max(0, start // cell - 1) * cell
            high = None if stop is None else -(-stop // cell) * cell
        position = low
        for block in mix(self._checked(low, high), low, self._rate, self._cancels):
            first, position = position, position + len(block)
            if position > start and (stop is None or first < stop):
                yield block[max(0, start - first) : None if stop is None else stop - first]

    def _checked(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        info, limits = self.info, self._limits
        source = self._read(start, stop)
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
                return
            block = self._sane(block, position)
            position += len(block)
            seconds = position / self._rate
            if seconds > limits.max_duration_s:
                raise DecodeError("limits", f"longer than {limits.max_duration_s:g} s", "TooLong")
            if spent > limits.cpu_base_s + limits.cpu_per_audio_s * seconds:
                raise DecodeError("limits", f"{spent:.0f} s of CPU for {seconds:.1f} s of audio", "TooSlow")
            yield block

    def _read(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """The reader's blocks; where libsndfile does not reach `stop`, FFmpeg's from there on."""
        position, why = start, None
        try:
            for block in self.reader.blocks(start, stop):
                position += len(block)
                yield block
        except CorruptError as error:
            if isinstance(self.reader, AvReader):
                raise
            why = str(error)
        if isinstance(self.reader, AvReader) or (stop is not None and position >= stop):
            return
        self._raise_fault()
        declared = self.info.num_frames
        if why is None and declared is not None and position < declared:
            why = f"samples end at {position / self._rate:.2f} s of {declared / self._rate:.2f} s"
        if why or self._goes_on():
            position = yield from self._read_on(position, stop)
        if stop is None or position < stop:
            self._check_length(position, declared, why)

    def _read_on(self, position: int, stop: int | None) -> Generator[np.ndarray, None, int]:
        """FFmpeg's blocks from `position` on; where they end."""
        width = 1 if self.info.channels == 1 or self._limits.channel != "mix" else None
        try:
            other = AvReader(self._target.for_ffmpeg(), self._pick, self._lose, self._rate, width)
        except UnreadableError:
            return position
        try:
            for block in other.blocks(position, stop):
                position += len(block)
                yield block
        except CorruptError:
            pass
        finally:
            other.close()
        return position

    def _goes_on(self) -> bool:
        """Whether frames are left behind the count that an MP3's header gave."""
        mp3 = isinstance(self.reader, SoundfileReader) and self.reader.is_mp3
        return mp3 and has_mp3_frame(self._target.rest())

    def _check_length(self, position: int, declared: int | None, why: str | None) -> None:
        """The file ended at `position`: did its header promise more?"""
        facts = self._target.facts
        slack = LENGTH_SLACK_S * self._rate
        end = declared or 0
        if facts.promised is not None and declared is not None:
            end = max(end, round(declared * facts.promised))
        if facts.granule is not None:
            end = max(end, min(facts.granule, position + 60 * self._rate))
        if end - position > slack or (facts.missing and end > position):
            text = facts.missing or (
                f"the header declares {end / self._rate:.2f} s, samples end at {position / self._rate:.2f} s"
            )
            self._lose(position, end, "TruncatedFile", f"{self.info.codec}: {why or text}")
        elif facts.missing:
            self._lose(position, None, "TruncatedFile", f"{self.info.codec}: {facts.missing}")

    def _lose(self, start: int, stop: int | None, error_class: str, why: str, stage: str = "decode") -> None:
        """A reader passed over the native frames [start, stop)."""
        self._raise_fault()
        at_s, rate = self.origin_s, self._rate
        end_s = None if stop is None else at_s + stop / rate
        span = LostSpan(at_s + start / rate, end_s, error_class, why, stage)
        if self._limits.on_damage == "fail" and (self._limits.gaps_fail or error_class != "Gap"):
            raise refuse(span)
        self.report.add(span)
        if stop is not None:
            self.silences.append((start, stop))

    def _cancels(self, start: int, stop: int) -> None:
        self.report.add_cancelled(self.origin_s + start / self._rate, self.origin_s + stop / self._rate)

    def _sane(self, block: np.ndarray, position: int) -> np.ndarray:
        """The block, with silence for samples that are no sound; they are a lost span."""
        if not len(block):
            return block
        flat = block.reshape(-1)
        if float(np.dot(flat, flat)) <= MAX_AMPLITUDE**2:  # several times faster than to look at each
            return block
        low, high = float(block.min()), float(block.max())
        if math.isfinite(low) and math.isfinite(high) and max(-low, high) <= MAX_AMPLITUDE:
            return block
        finite = np.isfinite(block).all(axis=1)
        with np.errstate(invalid="ignore"):
            bad = ~finite | (np.abs(block) > MAX_AMPLITUDE).any(axis=1)
        block = np.where(bad[:, None], np.float32(0), block)
        error_class = "AmplitudeOutOfRange" if finite.all() else "NonFiniteSamples"
        text = "NaN or infinite samples"
        if finite.all():
            text = f"amplitude {max(-low, high):.1e}; full scale is 1"
        edges = np.flatnonzero(np.diff(bad, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2)[: 1 << 12]:
            self._lose(position + int(first), position + int(last), error_class, text, "samples")
        return block

    def _raise_fault(self) -> None:
        if fault := self._target.fault():
            raise DecodeError("read", f"{type(fault).__name__}: {fault}", "ReadFailed")

    def close(self) -> None:
        self.reader.close()


@contextmanager
def opened(source: Any, limits: DecodeLimits, report: DecodeReport | None = None) -> Iterator[GuardedReader]:
    """Open with whichever reader knows the content; `DecodeError` for everything that can go wrong with it."""
    with _binary(source) as target:
        if target.size == 0:
            raise DecodeError("open", "the file is empty (0 bytes)", "EmptyFile")
        if target.size > limits.max_bytes:
            raise DecodeError("limits", f"{target.size} bytes; at most {limits.max_bytes}", "TooLarge")
        try:
            target.facts = inspect(target.file, target.size)
            if target.facts.missing and limits.on_damage == "fail":
                raise DecodeError("decode", target.facts.missing, "TruncatedFile")
            guarded = GuardedReader(target, limits, report if report is not None else DecodeReport())
        except OSError as error:
            raise DecodeError("read", str(error), "ReadFailed") from None
        except UnreadableError as error:
            if found := target.fault():
                raise DecodeError("read", f"{type(found).__name__}: {found}", "ReadFailed") from None
            name = format_name(target.file)
            what = f"{name}, which no decoder here reads" if name else "not audio that can be read"
            raise DecodeError("open", f"{what}: {error}", "UnknownFormat") from None
        try:
            _check_info(guarded.info, limits)
            yield guarded
        finally:
            guarded.close()


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
    too_long = info.duration_s is not None and info.duration_s > limits.max_duration_s
    if too_long and limits.on_damage == "fail":
        raise DecodeError(
            "limits", f"the header declares {info.duration_s:.0f} s; at most {limits.max_duration_s:g} s", "TooLong"
        )
    if info.num_frames == 0:
        raise DecodeError("decode", "the file holds no samples", "NoAudio")


class _Target:
    """The bytes of a file, as each of the C libraries likes them best."""

    def __init__(self, file: Any, size: int, path: str | None = None, recorder: RecordingFile | None = None) -> None:
        self.file, self.size, self._path, self._recorder = file, size, path, recorder
        self.facts = Facts()
        self._patched: Any = None

    def fault(self) -> Exception | None:
        """The first error of the source itself: a network fault is not a short file."""
        return self._recorder.error if self._recorder else None

    def for_libsndfile(self) -> Any:
        """An open file's number, which C reads alone, or the file; with the header put right."""
        self.file.seek(0)
        if self.facts.patches:
            return Patched(self.file, self.facts.patches)
        return self.file.fileno() if self._path else self.file

    def for_ffmpeg(self) -> Any:
        """A path or a file."""
        self.file.seek(0)
        if self.facts.patches:
            return Patched(self.file, self.facts.patches)
        return self._path or self.file

    def rest(self) -> bytes:
        """What lies behind the place that was read up to."""
        return bytes(self.file.read(1 << 20))


@contextmanager
def _binary(source: Any) -> Iterator[_Target]:
    if isinstance(source, bytes | bytearray | memoryview):
        yield _Target(io.BytesIO(source), len(source))
        return
    if isinstance(source, str) and "://" in source and not source.startswith("file://"):
        with _binary(open_source("", source)) as found:
            yield found
        return
    if isinstance(source, str | os.PathLike):
        path = os.path.abspath(os.fspath(source).removeprefix("file://"))
        with _open_local(path) as local:
            yield _Target(local, os.fstat(local.fileno()).st_size, path)
        return
    recorder = RecordingFile(source, getattr(source, "name", "stream"))
    size = recorder.seek(0, os.SEEK_END)
    recorder.seek(0)
    if recorder.error:
        raise DecodeError("read", f"{type(recorder.error).__name__}: {recorder.error}", "ReadFailed")
    yield _Target(recorder, size, recorder=recorder)


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
