"""Two ways to turn encoded audio into blocks of mono samples: libsndfile (`soundfile`) and FFmpeg (`av`).

Both readers start at any native frame and give exactly what a decode from the first frame gives there. Where the codec
can be entered in the middle with bit-equal results the reader seeks; where it cannot (Opus, AMR, WMA, AAC with noise
substitution, everything through FFmpeg) it decodes from the first frame and throws away what comes before.
`AudioInfo.exact_seek` says which of the two it is, so that a planner does not cut a file that is dear to enter.

What libsndfile 1.2.2 needs, found by comparing with full decodes:
- MP3: about 4,800 frames of lead-in fill the bit reservoir; afterwards the samples agree to 1e-7.
- Vorbis: a seek that lands in the last page of the stream is off by up to 1,000 frames, because that page's position is
  trimmed to the true length. We stay `VORBIS_LAST_PAGE` frames away from the end and read forward instead.
- Opus: still 1e-2 off after a second of lead-in (its predictors have long memory).
- MP3 without a Xing/Info/VBRI header: the length is a guess and reading stops there, so FFmpeg reads those.
"""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
import soundfile

BLOCK_VALUES = 1 << 20  # samples of all channels per block: 4 MiB of float32
MP3_LEAD_IN = 10 * 1152
VORBIS_LEAD_IN = 2 * 8192
VORBIS_LAST_PAGE = 255 * 4096  # 255 packets of the longest block Vorbis has
HEAD_BYTES = 16 << 10
OGG_PAGE_BYTES = 65_307  # at most
MISSING_BYTES = 1024  # that a wav may lack at its end and still count as whole

# Containers FFmpeg may open. Playlists and scripts (hls, concat, dash, ...) are left out: they make it open other URLs.
FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,gsm,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,"
    "mpc,mpc8,mpeg,mpegts,ogg,oma,rm,tak,truehd,tta,voc,w64,wav,wv,xwma"
)
SEEKABLE_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_", "IMA_ADPCM", "MS_ADPCM", "DPCM_")
TRUSTED_LENGTHS = ("mov,", "matroska,", "asf", "caf", "wav", "wv", "tta", "ape", "flac", "ogg")

Source = str | BinaryIO


class UnreadableError(Exception):
    """The bytes are not audio that this reader knows."""


class CorruptError(Exception):
    """Decoding started and then met bytes that make no sense."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself. Lengths are `None` where only a full decode would tell."""

    sample_rate: int
    channels: int
    codec: str
    num_frames: int | None
    exact_seek: bool
    """Entering in the middle is cheap and gives the same samples as decoding from the start."""

    @property
    def duration_s(self) -> float | None:
        """Length in seconds by the file's own header."""
        return None if self.num_frames is None else self.num_frames / self.sample_rate


class Reader(Protocol):
    """An open audio file."""

    info: AudioInfo
    length_is_promised: bool  # fewer frames than `info.num_frames` means that the file was cut

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """Mono float32 blocks of the native frames [start, stop), in order; shorter where the file ends."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def to_mono(samples: np.ndarray) -> np.ndarray:
    """The plain mean over channels of float32[frames, channels]."""
    channels = samples.shape[1]
    if channels == 1:
        return np.ascontiguousarray(samples[:, 0])
    if channels == 2:  # several times faster than a mean over an axis of two
        return (samples[:, 0] + samples[:, 1]) * np.float32(0.5)
    return samples.mean(axis=1, dtype=np.float32)


class _ForwardFile(soundfile.SoundFile):
    """A sound file that is only read forward.

    For files that can seek, `soundfile` seeks to the current position after every read, which in an MP3 empties the bit
    reservoir and in the last page of a Vorbis stream moves the position; a file that says it cannot is left alone.
    """

    def seekable(self) -> bool:
        return False


class SoundfileReader:
    """libsndfile: wav, flac, ogg, mp3, aiff, au, caf, w64, ... A path is read by C code alone, the fastest way."""

    def __init__(self, source: Source) -> None:
        try:
            self._file = _ForwardFile(source)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise UnreadableError(_reason(error)) from None
        file = self._file
        self._subtype = file.subtype
        if file.format == "OGG" and "Corrupted bitstream" in file.extra_info:
            file.close()
            raise UnreadableError("the ogg stream has holes")
        exact = soundfile.SoundFile.seekable(file) and (
            file.format == "FLAC"
            or self._subtype == "VORBIS"
            or self._subtype.startswith(("MPEG_LAYER_", *SEEKABLE_SUBTYPES))
        )
        codec = f"{file.format.lower()}/{self._subtype.lower()}"
        frames = file.frames if file.frames < 2**62 else None
        self.info = AudioInfo(file.samplerate, file.channels, codec, frames, exact)
        self.length_is_promised = True
        self.is_mp3 = self._subtype.startswith("MPEG_LAYER_")

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """See `Reader.blocks`."""
        position = self._enter(start)
        step = max(1, BLOCK_VALUES // self.info.channels)
        while stop is None or position < stop:
            count = min(step, (self._file.frames if stop is None else min(stop, self._file.frames)) - position)
            samples = self._read(count) if count > 0 else np.empty(0)
            if not len(samples):
                return
            skip = max(0, start - position)
            position += len(samples)
            if skip < len(samples):
                yield to_mono(samples[skip:])

    def _enter(self, start: int) -> int:
        target = start
        if self._subtype == "VORBIS":
            target = min(start - VORBIS_LEAD_IN, self._file.frames - VORBIS_LAST_PAGE)
        elif self.is_mp3:
            target = start - MP3_LEAD_IN
        if not self.info.exact_seek or target <= 0:
            return 0
        try:
            return int(self._file.seek(min(target, self._file.frames)))
        except soundfile.LibsndfileError as error:
            raise CorruptError(f"seeking failed: {_reason(error)}") from None

    def _read(self, count: int) -> np.ndarray:
        try:
            return self._file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise CorruptError(_reason(error)) from None

    def close(self) -> None:
        """See `Reader.close`."""
        self._file.close()


class AvReader:
    """FFmpeg: m4a, aac, 3gp, amr, webm, opus, wma, mp4, ... Always decodes from the first frame."""

    def __init__(self, source: Source) -> None:
        if isinstance(source, str):
            source = f"file:{source}"  # a colon in a name must not read as a protocol
        options = {"format_whitelist": FFMPEG_FORMATS, "protocol_whitelist": "file"}
        try:
            self._container = av.open(source, mode="r", options=options, metadata_errors="replace")
        except (av.FFmpegError, ValueError, UnicodeError) as error:
            raise UnreadableError(_reason(error)) from None
        try:
            self._stream = self._audio_stream()
        except UnreadableError:
            self._container.close()
            raise
        stream, context = self._stream, self._stream.codec_context
        context.thread_count = 1
        name = self._container.format.name
        rate, channels = context.sample_rate or 0, context.channels or 0
        codec = f"{name.split(',')[0]}/{context.name}"
        self.info = AudioInfo(rate, channels, codec, self._declared_frames(stream, rate), exact_seek=False)
        self.length_is_promised = name.startswith(TRUSTED_LENGTHS)

    def _audio_stream(self) -> av.AudioStream:
        streams = self._container.streams.audio
        if not streams:
            raise UnreadableError(f"a {self._container.format.name} file with no audio stream")
        if streams[0].codec_context is None:
            raise UnreadableError("no decoder for the audio stream")
        return streams[0]

    def _declared_frames(self, stream: av.AudioStream, rate: int) -> int | None:
        if stream.duration is not None and stream.time_base is not None:
            return max(0, round(stream.duration * stream.time_base * rate))
        if self._container.duration is not None:
            return max(0, round(self._container.duration / av.time_base * rate))
        return None

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """See `Reader.blocks`."""
        position = 0
        for samples in self._frames():
            first, position = position, position + len(samples)
            if position <= start:
                continue
            end = len(samples) if stop is None else min(len(samples), stop - first)
            yield to_mono(samples[max(0, start - first) : end])
            if stop is not None and position >= stop:
                return

    def _frames(self) -> Iterator[np.ndarray]:
        """Decoded frames, float32[frames, channels], joined to blocks worth a Python step."""
        waiting: list[np.ndarray] = []
        count = 0
        try:
            for frame in self._container.decode(self._stream):
                if frame.sample_rate != self.info.sample_rate:
                    raise CorruptError(
                        f"the rate changes from {self.info.sample_rate} to {frame.sample_rate} Hz midway"
                    )
                waiting.append(_frame_samples(frame))
                count += waiting[-1].size
                if waiting[-1].shape[1] != waiting[0].shape[1]:
                    raise CorruptError("the number of channels changes midway")
                if count >= BLOCK_VALUES:
                    yield np.concatenate(waiting)
                    waiting, count = [], 0
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise CorruptError(_reason(error)) from None
        if waiting:
            yield np.concatenate(waiting)

    def close(self) -> None:
        """See `Reader.close`."""
        self._container.close()


def _frame_samples(frame: av.AudioFrame) -> np.ndarray:
    """float32[frames, channels] in [-1, 1] from any of FFmpeg's sample formats."""
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, len(frame.layout.channels))
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    return array.astype(np.float32) / -float(np.iinfo(array.dtype).min)


def missing_data(file: BinaryIO, size: int) -> str | None:
    """Why a wav, aiff, au or ogg file of `size` bytes is cut short; `None` for whole files and other kinds.

    libsndfile reads a cut one as if it were whole: only the header (of the last page, in an ogg) tells.
    """
    head = file.read(HEAD_BYTES)
    kind = head[:4], head[8:12]
    if kind == (b"RIFF", b"WAVE"):
        declared = _chunk(head, "<I", b"data")
    elif kind in ((b"FORM", b"AIFF"), (b"FORM", b"AIFC")):
        declared = _chunk(head, ">I", b"SSND")
    elif head[:4] == b".snd" and len(head) >= 24:
        declared = struct.unpack_from(">II", head, 4)
    elif head[:4] == b"OggS":
        return _missing_ogg_data(file, size)
    else:
        return None
    if declared is None or declared[1] >= 0x7FFFF000:  # no such chunk, or a pipe's "I do not know yet"
        return None
    missing = sum(declared) - size
    if missing <= max(0.02 * declared[1], MISSING_BYTES):
        return None
    return f"the header declares {declared[1]} bytes of samples, {max(0, declared[1] - missing)} are there"


def _chunk(head: bytes, layout: str, name: bytes) -> tuple[int, int] | None:
    """(offset of the content, its declared length) of a chunk of a RIFF or FORM file."""
    at = 12
    while at + 8 <= len(head):
        length = int(struct.unpack_from(layout, head, at + 4)[0])
        if head[at : at + 4] == name:
            return at + 8, length
        at += 8 + length + (length & 1)
    return None


def _missing_ogg_data(file: BinaryIO, size: int) -> str | None:
    file.seek(max(0, size - 2 * OGG_PAGE_BYTES))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if not page.startswith(b"OggS"):
        return None
    length = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
    return f"the last page breaks off, {length - len(page)} bytes are missing" if length > len(page) else None


def has_mp3_length(file: BinaryIO) -> bool:
    """Whether an MP3 says how long it is: a Xing, Info or VBRI header in its first frame. Keeps the file's position."""
    position = file.tell()
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    file.seek(start)
    head = file.read(4096)
    file.seek(position)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _reason(error: BaseException) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".") or type(error).__name__


class RecordingFile(io.RawIOBase):
    """A seekable binary file that remembers the first error of its source.

    The C libraries turn a failing callback into "end of file"; `error` tells a network fault from a short file.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self.name = name
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.error = self.error or error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            self.error = self.error or error
            return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()
