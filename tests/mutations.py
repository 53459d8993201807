"""More than 200 files that a corpus should not hold but will: cut, flipped, mislabelled, absurd, or no files at all."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from tests.audio_files import signal, write_case

BASES = ["16.wav", "24.wav", "f32.wav", "ima.wav", "aiff", "mulaw.au", "caf", "flac", "ogg", "opus", "mp3", "vbr.mp3"]
BASES += ["m4a", "aac", "amr", "wma", "webm", "mka", "wv", "mp2"]


def make_mutated_files(folder: Path, seed: int = 0) -> list[Path]:
    """Write them into `folder`; the same bytes for the same seed, apart from what the encoders draw themselves."""
    rng = np.random.default_rng(seed)
    originals = folder / ".originals"
    originals.mkdir(parents=True)
    whole = {name: write_case(originals, name, seconds=1.5).read_bytes() for name in BASES}
    paths = []
    for name, data in whole.items():
        other = whole[BASES[(BASES.index(name) + 1) % len(BASES)]]
        for kind, mutated in _mutations(data, other, rng):
            path = folder / f"{kind}.{name}"
            path.write_bytes(mutated)
            paths.append(path)
    return paths + _crafted(folder) + _not_files(folder)


def _mutations(data: bytes, other: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for share in (0.01, 0.3, 0.7, 0.99):
        yield f"cut_{share}", data[: int(len(data) * share)]
    for count in (1, 30, 1000):
        yield f"flipped_{count}", _flip(data, rng.integers(0, len(data) * 8, count))
    yield "flipped_head", _flip(data, rng.integers(0, min(len(data), 200) * 8, 12))
    yield "no_head", data[100:]
    yield "zero_head", bytes(64) + data[64:]
    yield "wrong_head", other[:64] + data[64:]
    yield "hole", data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * len(data) // 3 :]
    yield "garbage_after", data + rng.bytes(5000)


def _flip(data: bytes, bits: np.ndarray) -> bytes:
    out = np.frombuffer(data, np.uint8).copy()
    np.bitwise_xor.at(out, bits // 8, (1 << (bits % 8)).astype(np.uint8))
    return out.tobytes()


def riff(
    rate: int = 16000, channels: int = 1, bits: int = 16, tag: int = 1, declared: int | None = None, data: bytes = b""
) -> bytes:
    """A wav whose header says what it is told to."""
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    size = len(data) if declared is None else declared
    body = b"WAVE" + b"fmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", (36 + size) & 0xFFFFFFFF) + body


def _crafted(folder: Path) -> list[Path]:
    pcm = (signal(16000, 1) * 32767).astype("<i2").tobytes()
    floats = signal(16000, 1)
    nan, infinite, huge = floats.copy(), floats.copy(), floats * np.float32(1e30)
    nan[9000], infinite[9000] = np.nan, -np.inf
    contents = {
        "zero_hz": riff(rate=0, data=pcm),
        "one_hz": riff(rate=1, data=pcm),
        "ten_megahertz": riff(rate=10_000_000, data=pcm),
        "four_gigahertz": riff(rate=0xFFFFFFFF, data=pcm),
        "no_channels": riff(channels=0, data=pcm),
        "64_channels": riff(channels=64, data=pcm * 8),
        "65535_channels": riff(channels=65535, data=pcm * 8),
        "no_bits": riff(bits=0, data=pcm),
        "many_bits": riff(bits=4096, data=pcm),
        "unknown_codec": riff(tag=0x7777, data=pcm),
        "huge_length": riff(declared=0x7FFFFFF0, data=pcm),
        "long_length": riff(declared=0x30000000, data=pcm),
        "no_samples": riff(),
        "one_sample": riff(data=pcm[:2]),
        "half_a_sample": riff(data=pcm[:1]),
        "nan": riff(bits=32, tag=3, data=nan.tobytes()),
        "infinite": riff(bits=32, tag=3, data=infinite.tobytes()),
        "amplitude_1e30": riff(bits=32, tag=3, data=huge.tobytes()),
        "silence": riff(data=bytes(32000)),
        "empty": b"",
        "one_byte": b"R",
        "only_riff": b"RIFF",
        "text": b"This is not a sound.\n" * 50,
        "html": b"<!doctype html><title>404</title><h1>Not found</h1>",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
        "zip": b"PK\x03\x04" + bytes(range(256)) * 4,
        "noise": np.random.default_rng(1).bytes(20000),
        "zeros": bytes(20000),
        "ones": b"\xff" * 20000,
        "endless_id3": b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(5000),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "concat_script": b"ffconcat version 1.0\nfile silence.wav\n",
        "sync_words": b"\xff\xfb\x90\x64" * 3000,
        "ogg_pages": b"OggS\x00\x02" + bytes(22) + b"\x01\xff" * 3000,
    }
    paths = []
    for name, data in contents.items():
        path = folder / f"{name}.wav"
        path.write_bytes(data)
        paths.append(path)
    bomb = folder / "bomb.flac"
    with soundfile.SoundFile(bomb, "w", 8000, 1, "PCM_16") as file:
        for _ in range(20):
            file.write(np.zeros(8000 * 60, np.int16))
    sparse = folder / "sparse.wav"
    with sparse.open("wb") as file:
        file.write(riff(rate=48000, channels=2, declared=1 << 28))
        file.truncate(44 + (1 << 28))  # 256 MiB of silence that takes no disk
    return [*paths, bomb, sparse]


def _not_files(folder: Path) -> list[Path]:
    (folder / "directory.wav").mkdir()
    (folder / "broken_link.wav").symlink_to("nowhere.wav")
    (folder / "link_to_itself.wav").symlink_to("link_to_itself.wav")
    os.mkfifo(folder / "pipe.wav")
    names = ["directory.wav", "broken_link.wav", "link_to_itself.wav", "pipe.wav", "absent.wav"]
    return [folder / name for name in names]
