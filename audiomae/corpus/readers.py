"""What a reader of encoded audio is, and the first of the two: libsndfile (`soundfile`). The other is `ffmpeg.py`.

Both start at any native frame and give exactly what a decode from the first frame gives there. Where the codec
can be entered in the middle with bit-equal results the reader seeks; where it cannot (Opus, AMR, WMA, AAC with noise
substitution, everything through FFmpeg) it decodes from the first frame and throws away what comes before.
`AudioInfo.exact_seek` says which of the two it is, so that a file which is slow to seek in is not cut into segments.

What libsndfile 1.2.2 needs, found by comparing with full decodes:
- MP3: about 4,800 frames of lead-in fill the bit reservoir; afterwards the samples agree to 1e-7.
- Vorbis: a seek that lands in the last page of the stream is off by up to 1,000 frames, because that page's position is
  trimmed to the true length. We stay `VORBIS_LAST_PAGE` frames away from the end and read forward instead.
- Opus: still 1e-2 off after a second of lead-in (its predictors have long memory).
- MP3 without a Xing or Info header (VBRI is not known to it): the length is a guess and reading stops there, so FFmpeg
  reads those.
- Lost pages of an Ogg stream and lost frames of an MP3 are skipped without an error; only its log tells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import soundfile

from audiomae.corpus.mixing import Pick

BLOCK_VALUES = 1 << 20  # samples of all channels per block: 4 MiB of float32
MP3_LEAD_IN = 10 * 1152
VORBIS_LEAD_IN = 2 * 8192
VORBIS_LAST_PAGE = 255 * 4096  # 255 packets of the longest block Vorbis has
SEEKABLE_SUBTYPES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_", "IMA_ADPCM", "MS_ADPCM", "DPCM_")
SFC_GET_CHANNEL_MAP_INFO = 0x1100
# libsndfile's SF_CHANNEL_MAP_ numbers
MAP_PLACES = {
    **{1: "FC", 2: "FL", 3: "FR", 4: "FC", 5: "FL", 6: "FR", 7: "FC", 8: "BC", 9: "BL", 10: "BR", 11: "LFE"},
    **{12: "FLC", 13: "FRC", 14: "SL", 15: "SR"},
}

Source = str | int | BinaryIO


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
    """An open audio file. What it cannot read it passes over, saying so to the `Lose` it was made with."""

    info: AudioInfo
    origin_s: float
    """Where in the file's time the first frame lies."""

    def blocks(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """float32[frames, 1 or 2] of the native frames [start, stop), in order; shorter where the file ends.

        Raises:
            CorruptError: this reader cannot go on.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class _ForwardFile(soundfile.SoundFile):
    """A sound file that is only read forward.

    For files that can seek, `soundfile` seeks to the current position after every read, which in an MP3 empties the bit
    reservoir and in the last page of a Vorbis stream moves the position; a file that says it cannot is left alone.
    """

    def seekable(self) -> bool:
        return False


class SoundfileReader:
    """libsndfile: wav, flac, ogg, mp3, aiff, au, caf, w64, ... An open file's number is read by C code alone."""

    origin_s = 0.0

    def __init__(self, source: Source, pick: Pick) -> None:
        try:
            self._file = _ForwardFile(source, closefd=False)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise UnreadableError(reason(error)) from None
        file = self._file
        self._subtype = file.subtype
        if file.format == "OGG" and (_holes(file) or file.channels > 2):
            file.close()
            raise UnreadableError("an ogg stream with holes or with many channels")
        exact = soundfile.SoundFile.seekable(file) and (
            file.format == "FLAC"
            or self._subtype == "VORBIS"
            or self._subtype.startswith(("MPEG_LAYER_", *SEEKABLE_SUBTYPES))
        )
        codec = f"{file.format.lower()}/{self._subtype.lower()}"
        frames = file.frames if file.frames < 2**62 else None
        self.info = AudioInfo(file.samplerate, file.channels, codec, frames, exact)
        self.is_mp3 = self._subtype.startswith("MPEG_LAYER_")
        self._pick, self._places = pick, _places(file)

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
                yield self._pick(samples[skip:], self._places)

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
            raise CorruptError(f"seeking failed: {reason(error)}") from None

    def _read(self, count: int) -> np.ndarray:
        try:
            samples = self._file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise CorruptError(reason(error)) from None
        if self._file.format == "OGG" and _holes(self._file):
            raise CorruptError("the ogg stream has holes")
        return np.asarray(samples)

    def close(self) -> None:
        """See `Reader.close`."""
        self._file.close()


def _holes(file: soundfile.SoundFile) -> bool:
    return "Corrupted bitstream" in file.extra_info


def _places(file: soundfile.SoundFile) -> tuple[str, ...]:
    """Where the channels belong, as far as the file says; empty for up to two, and where it does not."""
    if file.channels <= 2:
        return ()
    numbers = soundfile._ffi.new("int[]", file.channels)
    size = soundfile._ffi.sizeof(numbers)
    if not soundfile._snd.sf_command(file._file, SFC_GET_CHANNEL_MAP_INFO, numbers, size):
        return ()
    return tuple(MAP_PLACES.get(int(number), "") for number in numbers)


def reason(error: BaseException) -> str:
    """One line for a person from an exception of a decoding library."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".") or type(error).__name__
