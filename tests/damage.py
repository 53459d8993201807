"""Three hundred damaged files, twelve formats by 26 mutations, and what FFmpeg makes of a file by its timestamps."""

import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from tests.audio_files import write_case

FORMATS = ["16.wav", "f32.wav", "aiff", "flac", "ogg", "opus", "mp3", "no_header.mp3", "m4a", "aac", "webm", "wma"]
SECONDS = 4.0


def make_damaged_files(folder: Path, seed: int = 0) -> list[Path]:
    """Write them into `folder`."""
    originals = folder / ".originals"
    originals.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for name in FORMATS:
        whole = write_case(originals, name, seconds=SECONDS).read_bytes()
        for kind, data in mutations(whole, rng):
            path = folder / f"{kind}.{name}"
            path.write_bytes(data)
            paths.append(path)
    return paths


def mutations(whole: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each mutation; the head is spared, as it is on most damaged disks and broken downloads."""
    size = len(whole)

    def place(share: float) -> int:
        return int(size * share)

    for share in (0.3, 0.5, 0.8):
        yield f"bit_{share}", _over(whole, place(share), bytes([whole[place(share)] ^ 16]))
        yield f"noise_{share}", _over(whole, place(share), rng.bytes(64))
        yield f"zeros_{share}", _over(whole, place(share), bytes(size // 50))
    yield "burst", _over(whole, place(0.4), rng.bytes(size // 20))
    yield "sprinkled", _sprinkled(whole, rng, 30)
    yield "ones", _over(whole, place(0.6), b"\xff" * (size // 50))
    for share in (0.4, 0.9, 0.99):
        yield f"cut_{share}", whole[: place(share)]
    yield "last_frame_cut", whole[:-40]
    yield "last_byte_cut", whole[:-1]
    yield "gone_0.5", whole[: place(0.5)] + whole[place(0.53) :]
    yield "twice_0.5", whole[: place(0.5)] + whole[place(0.47) :]
    yield "zeros_behind", whole + bytes(20_000)
    yield "noise_behind", whole + rng.bytes(3000)
    yield "id3v1_behind", whole + b"TAG" + b"a title".ljust(125, b"\0")
    yield "ape_tag_behind", whole + _ape_tag()
    yield "lyrics_behind", whole + b"LYRICSBEGININD0000200" + b"la " * 40 + b"000141LYRICS200"
    yield "cut_and_zeros", whole[: place(0.7)] + bytes(size // 4)
    yield "text_behind", whole + b"\n--boundary--\r\n" * 20


def _over(whole: bytes, at: int, new: bytes) -> bytes:
    return (whole[:at] + new + whole[at + len(new) :])[: len(whole)]


def _sprinkled(whole: bytes, rng: np.random.Generator, count: int) -> bytes:
    out = bytearray(whole)
    for at in rng.integers(len(whole) // 5, len(whole), count):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _ape_tag() -> bytes:
    item = struct.pack("<II", 5, 0) + b"Title\0" + b"abcde"
    fields = struct.pack("<IIII", 2000, len(item) + 32, 1, 0) + bytes(8)
    return item + b"APETAGEX" + fields


def reference_pieces(path: Path) -> Iterator[tuple[float, np.ndarray, int]]:
    """(start in seconds, mono samples, rate) of what FFmpeg decodes, errors passed over as its own tool does.

    Times are the packets' own, from the first timestamp of any stream on; a clock that goes back begins anew.
    """
    end = 0.0
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        zero = None if len(file.streams) == 1 else max(0.0, (file.start_time or 0) / av.time_base)
        late = None
        for frame in _frames(file, stream):
            samples = frame.to_ndarray()
            if not frame.format.is_planar:
                samples = samples.reshape(-1, len(frame.layout.channels)).T
            scale = 1 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)
            untimed = frame.pts is None or (zero is not None and file.format.name == "mp3")  # it only counts frames
            start = end if untimed else float(frame.pts * stream.time_base) - (zero or 0.0)
            if zero is None:
                zero, start = start, 0.0
            if late is None:
                late = start if start > 0.01 else 0.0
                end = start
            if start < end - 0.25:
                zero, start = zero + start - end, end
            yield start, np.nan_to_num(samples.mean(axis=0) / scale), frame.sample_rate
            end = start + frame.samples / frame.sample_rate


def _frames(file: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    packets = file.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, ValueError):
            return
        if packet is None:
            return
        try:
            yield from stream.codec_context.decode(packet if packet.size else None)
        except (av.FFmpegError, ValueError):
            continue


def reference_spans(path: Path) -> list[tuple[float, float]]:
    """Seconds [start, end) that FFmpeg decodes, those that touch (but for rounding) in one."""
    spans: list[tuple[float, float]] = []
    try:
        for start, samples, rate in reference_pieces(path):
            end = start + len(samples) / rate
            if spans and abs(start - spans[-1][1]) < 0.015:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((start, end))
    except (av.FFmpegError, IndexError):
        pass  # it cannot be opened
    return spans


def reference(path: Path) -> tuple[np.ndarray, int, float]:
    """(float32 mono samples with silence in the gaps, rate, start in seconds) of a file, each frame in its place."""
    pieces = list(reference_pieces(path))
    rate, first = pieces[0][2], pieces[0][0]
    count = max(round((start - first) * rate) + len(samples) for start, samples, _ in pieces)
    out = np.zeros(count, np.float32)
    at = 0
    for start, samples, _ in pieces:
        place = round((start - first) * rate)
        at = place if abs(place - at) > 0.015 * rate else at  # rounding of the container's clock moves nothing
        out[at : at + len(samples)] = samples[: count - at]
        at += len(samples)
    return out, rate, first if first > 0.01 else 0.0
