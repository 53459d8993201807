"""One file under the loupe: what a job would make of it, and what its channels are like apart."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile

from audiomae.corpus.decode import DecodeReport, decode, probe
from audiomae.corpus.manifest import open_source
from audiomae.errors import AudioMAEError, DecodeError

DECODED_S = 60.0
SILENT_DB = -60.0
FULL_SCALE = 0.99
FLAT_SHARE, FLAT_COUNT, OVER_SHARE = 1e-4, 8, 1e-4
CANCEL_SHARE = 0.125
"""Of the channels' mean energy: less than this left in their mean is stereo that cancels."""
AV_ERRORS = (av.FFmpegError, ValueError, OSError, IndexError)


@dataclass
class Finding:
    """One decoded file. `kinds`: what is remarkable, of silent, cancelling, clipped, damaged, failed."""

    uri: str
    size: int
    codec: str = ""
    sample_rate: int = 0
    channels: int = 0
    duration_s: float = 0.0
    kinds: dict[str, str] = field(default_factory=dict)


def inspect(root: str, row: dict[str, Any]) -> Finding:
    """Decode the first minute of a file, as a job would and channel by channel, and say what is remarkable."""
    finding = Finding(row["uri"], row["size"])
    try:
        source = _reopenable(open_source(root, row["uri"], row.get("tar_offset"), row.get("size")))
        info = probe(source())
        finding.codec, finding.sample_rate, finding.channels = info.codec, info.sample_rate, info.channels
        finding.duration_s = info.duration_s or 0.0
        report = DecodeReport()
        samples = decode(source(), info.sample_rate, duration_s=DECODED_S, report=report)
        if report.lost:
            lost = report.lost[0]
            finding.kinds["damaged"] = f"{lost.error_class} at {lost.start_s:.2f} s: {lost.message}"
        finding.duration_s = finding.duration_s or len(samples) / info.sample_rate
        levels = _Levels()
        if info.channels == 1:  # as the job decoded it
            levels.add(samples[:, None])
        else:
            for block in _blocks(source(), round(DECODED_S * info.sample_rate)):
                levels.add(block)
    except DecodeError as error:
        kind = "damaged" if error.error_class in ("TruncatedFile", "CorruptAudio") and finding.codec else "failed"
        finding.kinds[kind] = f"{error.error_class}: {error.message}"
    except (AudioMAEError, OSError, MemoryError) as error:
        finding.kinds["failed"] = f"{type(error).__name__}: {error}"
    else:
        finding.kinds |= levels.remarks()
    return finding


def _reopenable(source: Path | bytes | BinaryIO) -> Callable[[], Any]:
    """The source, from its start at each call."""
    if isinstance(source, Path | bytes):
        return lambda: source

    def again() -> BinaryIO:
        source.seek(0)
        return source

    return again


class _Levels:
    """Peak and flat tops of the channels of a file, and their energy where there are several."""

    def __init__(self) -> None:
        self.frames = self.channels = self.flat = self.over = 0
        self.peak = self.energy = self.mixed = 0.0

    def add(self, block: np.ndarray) -> None:
        """Take float[frames, channels] into account."""
        if not len(block):
            return
        self.frames, self.channels = self.frames + len(block), block.shape[1]
        peak = max(float(block.max()), -float(block.min()))
        self.peak = max(self.peak, peak)
        if block.shape[1] > 1:
            self.energy += float(np.einsum("fc,fc->", block, block, dtype=np.float64)) / block.shape[1]
            self.mixed += float(np.square(block.mean(axis=1, dtype=np.float64)).sum())
        if peak < FULL_SCALE:
            return
        loud = np.abs(block)
        self.over += int((loud > 1.0 + 1e-4).sum())
        same = (block[1:] == block[:-1]) & (loud[1:] >= FULL_SCALE)
        self.flat += int((same[2:] & same[1:-1] & same[:-2]).sum()) if len(same) > 2 else 0

    def remarks(self) -> dict[str, str]:
        """What is remarkable, and by how much."""
        if self.peak < 10 ** (SILENT_DB / 20):
            return {"silent": f"peak {20 * math.log10(max(self.peak, 1e-10)):.0f} dBFS"}
        found: dict[str, str] = {}
        if self.channels > 1 and self.mixed < CANCEL_SHARE * self.energy:
            found["cancelling"] = f"the mean of its channels keeps {self.mixed / self.energy:.1%} of their energy"
        samples = self.frames * self.channels
        if (self.flat >= FLAT_COUNT and self.flat > FLAT_SHARE * samples) or self.over > OVER_SHARE * samples:
            found["clipped"] = f"{(self.flat + self.over) / samples:.2%} of its samples at full scale"
        return found


def _blocks(source: Any, frames: int) -> Iterator[np.ndarray]:
    """The first `frames` frames, float32[n, channels] at a time; nothing where no library gives the channels apart."""
    handle = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with soundfile.SoundFile(handle) as file:
            while frames > 0 and len(block := file.read(min(frames, 1 << 18), "float32", always_2d=True)):
                frames -= len(block)
                yield block
        return
    except (soundfile.SoundFileError, RuntimeError):
        if not isinstance(handle, Path):
            handle.seek(0)
    try:
        with av.open(str(handle) if isinstance(handle, Path) else handle) as file:
            planar = av.AudioResampler(format="fltp")
            for frame in file.decode(audio=0):
                for piece in planar.resample(frame):
                    yield piece.to_ndarray().T
                    frames -= piece.samples
                if frames <= 0:
                    return
    except AV_ERRORS:
        return
