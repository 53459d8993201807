"""FFmpeg (`av`) as a reader: whatever it decodes, each frame where its timestamp says, over damage and gaps.

Time is the file's: 0 is the first timestamp of any of its streams. Within the sound track

- a jump ahead (lost packets, a recorder that paused) is silence of that length and a lost span;
- a jump back by more than `OVERLAP_S` (files joined end to end, each counting from 0) goes on where the last one ended;
- smaller differences are the rounding of the container and move nothing (but in Ogg and FLAC, which count samples);
- a packet that does not decode costs its own span, known by the timestamp of the next good frame.

A track that begins after the others (a video whose sound sets in later) has `origin_s`; its frames count from there.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import av
import numpy as np
import soxr

from audiomae.corpus.damage import Lose
from audiomae.corpus.mixing import Pick
from audiomae.corpus.readers import BLOCK_VALUES, AudioInfo, CorruptError, Source, UnreadableError, reason

# Containers FFmpeg may open. Playlists and scripts (hls, concat, dash, ...) are left out: they make it open other URLs.
FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,iff,loas,matroska,webm,mov,mp4,m4a,3gp,"
    "3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,ogg,oma,rm,shn,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
OWN_LENGTHS = ("mov,", "asf", "caf", "wav", "w64", "wv", "tta", "ape", "flac", "ogg", "aiff", "dsf", "iff")
"""Formats whose streams declare a length that can be held against what is there."""
TIMED = ("mov,", "matroska", "mpegts", "mpeg", "flv", "asf", "avi", "ogg", "rm", "flac")
"""Formats whose packets say where they belong; the others' timestamps are counted from the packets before."""

COUNTED = ("ogg", "flac")
"""Formats whose timestamps count samples, so that a frame which begins before the last one ends repeats some."""

JITTER_S = 0.015
OVERLAP_S = 0.25
LATE_S = 0.01
LENGTH_SLACK_S = 0.1
MAX_GAP_S = 3600.0
"""A longer jump ahead is a broken clock, not a pause."""


class AvReader:
    """m4a, aac, 3gp, amr, webm, opus, wma, mp4, ... and anything damaged. Always decodes from the first frame."""

    is_seekable = False

    def __init__(
        self, source: Source, pick: Pick, lose: Lose, rate: int | None = None, width: int | None = None
    ) -> None:
        """Open `source`; give frames at `rate` and in `width` columns, by default those of the first frame."""
        if isinstance(source, str):
            source = f"file:{source}"  # a colon in a name must not read as a protocol
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        try:
            self._container = av.open(source, mode="r", options=options, metadata_errors="replace")
        except (av.FFmpegError, ValueError, UnicodeError) as error:
            raise UnreadableError(reason(error)) from None
        try:
            self._stream = self._audio_stream()
        except UnreadableError:
            self._container.close()
            raise
        stream, context = self._stream, self._stream.codec_context
        context.thread_count = 1
        self._pick, self._lose, self._width = pick, lose, width
        self._name = self._container.format.name
        self._tick_s = float(stream.time_base) if stream.time_base else 0.0
        codec = f"{self._name.split(',')[0]}/{context.name}"
        native = rate or context.sample_rate or 0
        self.info = AudioInfo(native, context.channels or 0, codec, self._declared(native), exact_seek=False)
        self._frames: Iterator[_Heard] = self._decoded()
        self.origin_s = self._origin()

    def _audio_stream(self) -> Any:
        streams = self._container.streams.audio
        if not streams:
            raise UnreadableError(f"a {self._container.format.name} file with no audio stream")
        if streams[0].codec_context is None:
            raise UnreadableError("no decoder for the audio stream")
        return streams[0]

    def _declared(self, rate: int) -> int | None:
        """Frames by the stream's own length, or the file's where sound is all there is; `None` or more than 0."""
        stream, seconds = self._stream, None
        start_s = max(0.0, (stream.start_time or 0) * self._tick_s)
        if stream.duration is not None:
            seconds = stream.duration * self._tick_s
        elif (tag := stream.metadata.get("DURATION")) is not None:
            seconds = _clock_seconds(tag, start_s)
        elif self._container.duration is not None and len(self._container.streams) == 1:
            seconds = self._container.duration / av.time_base
        return round(seconds * rate) if seconds is not None and seconds > 0 else None

    def _origin(self) -> float:
        """How many seconds after the file's first timestamp the sound begins; 0 where that is the sound's own."""
        start, zero = self._stream.start_time, self._container.start_time
        if start is None or zero is None or len(self._container.streams) == 1:
            return 0.0
        zero_s = max(0.0, zero / av.time_base)
        if start * self._tick_s - zero_s <= LATE_S:
            return 0.0
        first = next(self._frames)  # an encoder's run-in, which nobody hears, counts in the stream's start
        self._frames = chain([first], self._frames)
        time_s = start * self._tick_s if first.time_s is None else first.time_s
        return max(0.0, time_s - zero_s)

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """See `Reader.blocks`; once for each time the file is opened."""
        position = 0
        for samples in self._joined():
            first, position = position, position + len(samples)
            if position <= start:
                continue
            end = len(samples) if stop is None else min(len(samples), stop - first)
            yield samples[max(0, start - first) : end]
            if stop is not None and position >= stop:
                return

    def _joined(self) -> Iterator[np.ndarray]:
        """The frames, joined to blocks worth a Python step."""
        waiting: list[np.ndarray] = []
        count = 0
        for samples in self._placed():
            waiting.append(samples)
            count += samples.size
            if count >= BLOCK_VALUES:
                yield np.concatenate(waiting)
                waiting, count = [], 0
        if waiting:
            yield np.concatenate(waiting)

    def _placed(self) -> Iterator[np.ndarray]:
        """Decoded frames, float32[frames, width], silence where there are none."""
        rate, line = self.info.sample_rate, _Line(self._name, self.info.sample_rate)
        converter: _Converter | None = None
        for frame, time_s, failure in _settled(self._frames):
            if frame is None:
                line.failed(failure)
                break
            samples = self._columns(frame)
            if converter is None or converter.rate != frame.sample_rate:
                if converter is not None:
                    yield from converter.finish()
                converter = _Converter(frame.sample_rate, rate, samples.shape[1])
            gap = line.gap(time_s, failure)
            if gap < 0:
                samples, gap = samples[round(-gap * frame.sample_rate / rate) :], 0
            if gap:
                yield from converter.finish()
                text = failure.why if failure else f"no sound for {gap / rate:.2f} s by the file's own timestamps"
                self._lose(line.at, line.at + gap, "CorruptAudio" if failure else "Gap", text)
                yield from _silence(gap, samples.shape[1])
            line.exact += gap + len(samples) * rate / frame.sample_rate
            yield from converter.feed(samples)
        if converter is not None:
            yield from converter.finish()
        self._end(line)

    def _end(self, line: "_Line") -> None:
        """The last frame is out: was more promised, or met and not decoded?"""
        end, why = line.failed_until, line.failure
        declared = self.info.num_frames if self._name.startswith((*OWN_LENGTHS, "matroska")) else None
        if declared is not None and declared - line.at > LENGTH_SLACK_S * self.info.sample_rate:
            why = why or (
                f"{self.info.codec}: the header declares {declared / self.info.sample_rate:.2f} s, "
                f"samples end at {line.at / self.info.sample_rate:.2f} s"
            )
            self._lose(line.at, max(end, declared), "TruncatedFile", why)
        elif why and end > line.at:
            self._lose(line.at, end, "CorruptAudio", why)
        elif why and line.at == 0:
            raise CorruptError(why)

    def _decoded(self) -> Iterator["_Heard"]:
        """Frames in order, each with what failed before it, and at the end `None` with what failed after the last.

        What does not decode is skipped, as FFmpeg's own tool does.
        """
        context, failure = self._stream.codec_context, None
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = context.decode(packet if packet.size else None)
                except (av.FFmpegError, ValueError, MemoryError) as error:
                    failure = self._failure(packet, reason(error), failure)
                    continue
                for frame in frames:
                    yield _Heard(frame, None if frame.pts is None else frame.pts * self._tick_s, failure)
                    failure = None
        except (av.FFmpegError, ValueError, MemoryError) as error:
            failure = _Failure(f"{self.info.codec}: {reason(error)}", None, None)
        yield _Heard(None, None, failure)

    def _failure(self, packet: Any, why: str, before: "_Failure | None") -> "_Failure | None":
        if packet.size and self._name in ("mp3", "aac") and not _is_frame(bytes(packet)):
            return before  # zeros, tags and the like between or behind the frames
        start_s = end_s = None
        if packet.pts is not None:
            start_s, end_s = packet.pts * self._tick_s, (packet.pts + (packet.duration or 0)) * self._tick_s
        return before._replace(end_s=end_s) if before else _Failure(f"{self.info.codec}: {why}", start_s, end_s)

    def _columns(self, frame: Any) -> np.ndarray:
        samples = self._pick(_frame_samples(frame), _places(frame.layout))
        if self._width is None:
            self._width = samples.shape[1]
        if samples.shape[1] == self._width:
            return samples
        return samples.mean(axis=1, keepdims=True) if self._width == 1 else np.repeat(samples, self._width, axis=1)

    def close(self) -> None:
        """See `Reader.close`."""
        self._container.close()


class _Failure(NamedTuple):
    """Packets that gave nothing, between two timestamps."""

    why: str
    start_s: float | None
    end_s: float | None


class _Heard(NamedTuple):
    """A frame (`None` after the last one), its timestamp, and what failed before it."""

    frame: Any
    time_s: float | None
    failure: _Failure | None


def _settled(heard: Iterator[_Heard]) -> Iterator[_Heard]:
    """The same, without the timestamps that the very next frame takes back (FFmpeg misplaces some in MPEG streams)."""
    held: _Heard | None = None
    for one in heard:
        if held is not None:
            if one.time_s is not None and held.time_s is not None:
                end_s = held.time_s + held.frame.samples / held.frame.sample_rate
                if one.time_s < end_s - JITTER_S:
                    held = held._replace(time_s=None)
            yield held
        held = one
    if held is not None:
        yield held


class _Line:
    """Where the next frame belongs, in frames from the first one's timestamp."""

    def __init__(self, name: str, rate: int) -> None:
        self._timed, self._counted, self._rate = name.startswith(TIMED), name.startswith(COUNTED), rate
        self._zero_s: float | None = None
        self.exact = 0.0
        self.failure: str | None = None
        self.failed_until = 0

    @property
    def at(self) -> int:
        return round(self.exact)

    def gap(self, time_s: float | None, failure: _Failure | None) -> int:
        """Frames of silence before the frame with this timestamp; less than 0: how many of its own repeat others."""
        if time_s is None:
            return 0
        if self._zero_s is None:
            self._zero_s = failure.start_s if failure and failure.start_s is not None else time_s
        ahead_s = time_s - self._zero_s - self.exact / self._rate
        if ahead_s < -OVERLAP_S or ahead_s > MAX_GAP_S:
            self._zero_s += ahead_s
            return 0
        counted = self._counted and ahead_s < -JITTER_S
        if not counted and (ahead_s <= (0.002 if failure else JITTER_S) or not (self._timed or failure)):
            return 0
        return round((time_s - self._zero_s) * self._rate) - self.at

    def failed(self, failure: _Failure | None) -> None:
        """Nothing comes any more, and `failure` is what came last."""
        if failure is not None:
            self.failure = failure.why
            if failure.end_s is not None and self._zero_s is not None:
                self.failed_until = round((failure.end_s - self._zero_s) * self._rate)


class _Converter:
    """Frames of one rate, converted to the file's where it is another."""

    def __init__(self, rate: int, wanted: int, width: int) -> None:
        self.rate, self._width = rate, width
        self._stream = None if rate == wanted else soxr.ResampleStream(rate, wanted, width, "float32", "HQ")

    def feed(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        if self._stream is not None:
            samples = self._stream.resample_chunk(np.ascontiguousarray(samples)).reshape(-1, self._width)
        if len(samples):
            yield samples

    def finish(self) -> Iterator[np.ndarray]:
        if self._stream is not None:
            rest = self._stream.resample_chunk(np.empty((0, self._width), np.float32), last=True)
            self._stream.clear()
            if len(rest):
                yield rest.reshape(-1, self._width)


def _silence(frames: int, width: int) -> Iterator[np.ndarray]:
    step = BLOCK_VALUES // width
    for first in range(0, frames, step):
        yield np.zeros((min(step, frames - first), width), np.float32)


def _clock_seconds(text: str, start_s: float) -> float | None:
    """Seconds from `start_s` to `HH:MM:SS.sss`, the end of a Matroska track; `None` for other text."""
    try:
        hours, minutes, seconds = text.strip("\0 ").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - start_s
    except ValueError:
        return None


def _is_frame(data: bytes) -> bool:
    """Whether a packet begins as MPEG or ADTS frames do, and is not the note on a file's length that MP3s carry."""
    frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0
    return frame and not any(mark in data[:64] for mark in (b"Xing", b"Info", b"VBRI"))


def _places(layout: Any) -> tuple[str, ...]:
    return tuple(channel.name for channel in layout.channels) if layout.nb_channels > 2 else ()


def _frame_samples(frame: Any) -> np.ndarray:
    """float32[frames, channels] in [-1, 1] from any of FFmpeg's sample formats."""
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, len(frame.layout.channels))
    if array.dtype.kind == "f":
        return np.asarray(array.astype(np.float32, copy=False))
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    return array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
