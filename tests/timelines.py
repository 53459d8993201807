"""Files whose times are known: a tone burst starts every second, and something is wrong between container and clock.

Second k begins with a burst of 500 + 100 k Hz. `make_timeline_files` crosses containers with faults and places; each
file comes with the times at which the bursts that are still in it are heard, and the seconds of sound that it holds.
"""

import io
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile

SECONDS = 6
BURST_S = 0.15


class Timeline(NamedTuple):
    """`bursts`: (second k, when it is heard, s). `start_s`, `end_s`: of the sound. `sound_s`: of it that is there."""

    path: Path
    bursts: list[tuple[int, float]]
    start_s: float
    end_s: float
    sound_s: float


def bursts(rate: int, seconds: float = SECONDS, first: int = 0) -> np.ndarray:
    """float32[samples]: the bursts of seconds `first`, `first + 1`, ..., silence between them."""
    time = np.arange(round(rate * seconds)) / rate
    second = np.floor(time)
    tone = np.sin(2 * np.pi * (500 + 100 * (first + second)) * (time - second))
    return (0.5 * tone * (time - second < BURST_S)).astype(np.float32)


# container: (format, codec, rate, bit rate, codec options, muxer options)
FRAGMENTS = {"movflags": "frag_keyframe+delay_moov+default_base_moof", "frag_duration": "500000"}
CONTAINERS: dict[str, tuple[str, str, int, dict[str, str]]] = {
    "webm": ("webm", "libopus", 48000, {}),
    "live.webm": ("webm", "libopus", 48000, {"live": "1", "cluster_time_limit": "500"}),
    "aac.mkv": ("matroska", "aac", 44100, {}),
    "flac.mkv": ("matroska", "flac", 44100, {}),
    "m4a": ("mp4", "aac", 48000, {}),
    "fragmented.mp4": ("mp4", "aac", 44100, FRAGMENTS),
    "opus.mp4": ("mp4", "libopus", 48000, FRAGMENTS),
    "aac.ts": ("mpegts", "aac", 44100, {}),
    "mp2.ts": ("mpegts", "mp2", 48000, {}),
    "flv": ("flv", "aac", 44100, {}),
    "wma": ("asf", "wmav2", 44100, {}),
    "opus.ogg": ("ogg", "libopus", 48000, {"page_duration": "20000"}),
}

PICTURES = {"webm": "libvpx", "mpegts": "mpeg2video", "flv": "flv"}

Fault = Callable[[float], float | None]
"""The time that a packet of this time is given in the file; `None` drops it."""


def mux(path: Path, container: str, fault: Fault = lambda time: time, picture_s: float = 0.0) -> None:
    """Encode the bursts and write their packets as `fault` says, beside `picture_s` seconds of picture."""
    name, codec, rate, options = CONTAINERS[container]
    with av.open(str(path), "w", format=name, options=options) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono", options={"strict": "-2"})
        stream.bit_rate = 96_000
        video = None
        if picture_s:
            video = file.add_stream(
                {"webm": "libvpx", "mpegts": "mpeg2video", "flv": "flv"}.get(name, "mpeg4"), rate=25
            )
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        packets = []
        if video is not None:
            for number in range(round(5 * picture_s)):
                picture = av.VideoFrame(64, 64, "yuv420p")
                for plane in picture.planes:
                    plane.update(bytes([number % 256]) * plane.buffer_size)
                picture.pts = number
                packets += video.encode(picture)
            packets += video.encode(None)
        shifted = []
        for packet in encoded(stream, bursts(rate), rate):
            time = fault(max(0.0, float(packet.pts * packet.time_base)))
            if time is not None:
                moved = round((time - max(0.0, float(packet.pts * packet.time_base))) / packet.time_base)
                packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                shifted.append(packet)
        packets += shifted
        for packet in sorted(packets, key=lambda one: float(one.dts * one.time_base)):
            file.mux(packet)


def encoded(stream: av.AudioStream, samples: np.ndarray, rate: int) -> list[av.Packet]:
    """Mono float samples as the packets of a stream."""
    context = stream.codec_context
    context.open()
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    pieces = av.AudioResampler(context.format, "mono", rate, frame_size=context.frame_size or 1024)
    packets = []
    for piece in [*pieces.resample(frame), *pieces.resample(None)]:
        packets += stream.encode(piece)
    return packets + stream.encode(None)


def make_timeline_files(folder: Path) -> list[Timeline]:
    """All of them, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*_gaps(folder), *_pauses(folder), *_losses(folder), *_beside_pictures(folder)]


def _everything(shift: Callable[[int], float] = float, drop: Sequence[int] = ()) -> list[tuple[int, float]]:
    return [(k, shift(k)) for k in range(SECONDS) if k not in drop]


def _gaps(folder: Path) -> Iterable[Timeline]:
    """Packets of one to three seconds are lost."""
    for container in CONTAINERS:
        for first, last in ((1.5, 2.6), (2.4, 4.8)):
            path = folder / f"gap_{first:g}.{container}"
            mux(path, container, lambda time, a=first, b=last: None if a <= time < b else time)
            lost = [k for k in range(SECONDS) if first < k + BURST_S and k < last]
            yield Timeline(path, _everything(drop=lost), 0.0, SECONDS, SECONDS - (last - first))


def _pauses(folder: Path) -> Iterable[Timeline]:
    """A live recorder stands still: nothing is lost, all that follows is later."""
    for container in ("webm", "live.webm", "aac.mkv", "fragmented.mp4", "opus.mp4", "aac.ts", "mp2.ts", "flv"):
        for place, pause in ((2.5, 2.0), (0.5, 5.5)):
            path = folder / f"pause_{pause:g}.{container}"
            mux(path, container, lambda time, at=place, by=pause: time if time < at else time + by)
            times = _everything(lambda k, at=place, by=pause: k if k < at else k + by)
            yield Timeline(path, times, 0.0, SECONDS + pause, SECONDS)


def _losses(folder: Path) -> Iterable[Timeline]:
    """Single packets are lost, here and there."""
    for container in ("webm", "aac.mkv", "m4a", "aac.ts", "opus.ogg"):
        path = folder / f"losses.{container}"
        mux(path, container, lambda time: None if time % 1 > 0.5 and time % 0.1 < 0.03 else time)
        yield Timeline(path, _everything(), 0.0, SECONDS, SECONDS)


def _beside_pictures(folder: Path) -> Iterable[Timeline]:
    """The sound track begins after the picture, or ends before it."""
    for container in ("webm", "aac.mkv", "m4a", "fragmented.mp4", "aac.ts", "flv"):
        for late in (0.75, 3.0):
            path = folder / f"late_{late:g}.{container}"
            mux(path, container, lambda time, by=late: time + by, picture_s=SECONDS + late)
            times = _everything(lambda k, by=late: k + by)
            yield Timeline(path, times, late, SECONDS + late, SECONDS)
        path = folder / f"short.{container}"
        mux(path, container, picture_s=2 * SECONDS)
        yield Timeline(path, _everything(), 0.0, SECONDS, SECONDS)


# --- files that are longer than they say ------------------------------------------------------------------------------


def sound(kind: str, subtype: str, rate: int, seconds: float, first: int = 0) -> bytes:
    """Bursts as the bytes of a file that libsndfile writes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, bursts(rate, seconds, first), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


ID3 = b"ID3\x04\x00\x00\x00\x00\x02\x00TIT2\x00\x00\x00\x05\x00\x00\x03abc" + bytes(241)


def make_joined_files(folder: Path) -> list[Timeline]:
    """Streams end to end, and counts that are wrong: every one to be read to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "vorbis.ogg": ("OGG", "VORBIS", 22050),
        "opus.ogg": ("OGG", "OPUS", 48000),
        "mp3": ("MP3", "MPEG_LAYER_III", 22050),
        "44.mp3": ("MP3", "MPEG_LAYER_III", 44100),
    }
    files: dict[str, list[tuple[float, bytes]]] = {}
    for name, kind in parts.items():
        a, b, c = (sound(*kind, seconds, first) for seconds, first in ((4, 0), (2, 4), (1, 6)))
        files[f"two.{name}"] = [(4, a), (2, b)]
        files[f"three.{name}"] = [(4, a), (2, b), (1, c)]
        files[f"short_first.{name}"] = [(1, sound(*kind, 1, 0)), (3, sound(*kind, 3, 1))]
        files[f"same_twice.{name}"] = [(4, a), (4, a)]
    a, b = (_ogg_flac(seconds, first) for seconds, first in ((4, 0), (2, 4)))
    files["two.flac.ogg"] = [(4, a), (2, b)]
    files["same_twice.flac.ogg"] = [(4, a), (4, a)]
    a, b = (sound("MP3", "MPEG_LAYER_III", 44100, seconds, first) for seconds, first in ((4, 0), (2, 4)))
    files["tag_between.mp3"] = [(4, ID3 + a), (2, ID3 + b)]
    files["old_tag_between.mp3"] = [(4, a + b"TAG" + bytes(125)), (2, b)]
    made = []
    for name, members in files.items():
        path = folder / name
        path.write_bytes(b"".join(data for _, data in members))
        total = sum(seconds for seconds, _ in members)
        times = [(k if "same" not in name else k % 4, float(k)) for k in range(int(total))]
        made.append(Timeline(path, times, 0.0, total, total))
    return [*made, *_miscounted(folder)]


def _ogg_flac(seconds: float, first: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg") as file:
        stream = file.add_stream("flac", rate=22050, layout="mono")
        for packet in encoded(stream, bursts(22050, seconds, first), 22050):
            file.mux(packet)
    return buffer.getvalue()


def _miscounted(folder: Path) -> Iterable[Timeline]:
    """An MP3's Xing header and a FLAC's STREAMINFO that count too few or too many."""
    whole = bytearray(sound("MP3", "MPEG_LAYER_III", 22050, SECONDS))
    at = next(whole.find(mark) for mark in (b"Xing", b"Info") if mark in whole) + 8
    frames = struct.unpack_from(">I", whole, at)[0]
    for share in (0.05, 0.4, 0.97, 1.5):
        struct.pack_into(">I", whole, at, round(frames * share))
        path = folder / f"xing_{share:g}.mp3"
        path.write_bytes(whole)
        yield Timeline(path, _everything(), 0.0, SECONDS, SECONDS)
    path = folder / "vbri.mp3"
    vbri = b"VBRI" + struct.pack(">HHHIIHHHH", 1, 0, 75, len(whole), round(frames * 0.3), 0, 1, 2, 0)
    data = bytearray(whole)
    data[4:] = bytes(32) + vbri + bytes(len(whole))  # in the place that VBRI has
    length = whole.find(b"\xff", at + 100)
    data = bytes(whole[:4]) + (bytes(32) + vbri + bytes(400))[: length - 4] + bytes(whole[length:])
    path.write_bytes(data)
    yield Timeline(path, _everything(), 0.0, SECONDS, SECONDS)
    whole = bytearray(sound("FLAC", "PCM_16", 22050, SECONDS))
    for total in (0, 30_000, 22050 * SECONDS - 5000):
        whole[21:26] = bytes([whole[21] & 0xF0]) + total.to_bytes(4, "big")
        path = folder / f"count_{total}.flac"
        path.write_bytes(whole)
        yield Timeline(path, _everything(), 0.0, SECONDS, SECONDS)


UNFINISHED = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM")]
UNFINISHED += [("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "PCM_24"), ("AU", "PCM_16")]
UNFINISHED += [("CAF", "PCM_16"), ("W64", "PCM_16")]


def make_unfinished_files(folder: Path) -> list[Timeline]:
    """Files whose recorder died before it wrote the lengths into the header, and pipes that never knew them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for kind, subtype in UNFINISHED:
        whole = sound(kind, subtype, 16000, SECONDS)
        for name, length in (("0", 0), ("unknown", -1)):
            path = folder / f"{kind}_{subtype}_{name}.{kind.lower()}"
            path.write_bytes(unfinished(kind, whole, length))
            made.append(Timeline(path, _everything(), 0.0, SECONDS, SECONDS))
    return made


def unfinished(kind: str, whole: bytes, length: int) -> bytes:
    """`whole` with its lengths set to 0, or (-1) to all ones."""
    data = bytearray(whole)

    def put(at: int, size: int) -> None:
        data[at : at + size] = bytes(size) if length == 0 else b"\xff" * size

    if kind in ("WAV", "WAVEX"):
        put(4, 4)
        put(data.index(b"data") + 4, 4)
        if b"fact" in data[:100]:
            put(data.index(b"fact") + 8, 4)
    elif kind == "RF64":
        put(data.index(b"ds64") + 8, 24)
    elif kind == "AIFF":
        put(4, 4)
        put(data.index(b"SSND") + 4, 4)
        put(data.index(b"COMM") + 10, 4)
    elif kind == "AU":
        put(8, 4)
    elif kind == "CAF":
        put(data.index(b"data", 8) + 4, 8)
    elif kind == "W64":
        put(16, 8)
        put(data.index(b"data\xf3\xac\xd3\x11") + 16, 8)
    return bytes(data)
