"""Formats that no library here writes, each with the least that makes a file of it."""

import struct

import numpy as np

DSD_RATE = 2_822_400


def dsf(seconds: float, hertz: float) -> bytes:
    """Mono DSD64 in Sony's container: bits least significant first, in blocks of 4,096 bytes."""
    bits = _one_bit(seconds, hertz)
    data = np.packbits(bits, bitorder="little").tobytes()
    data += bytes(-len(data) % 4096)
    form = b"fmt " + struct.pack("<QIIIIIIQII", 52, 1, 0, 1, 1, DSD_RATE, 1, len(bits), 4096, 0)
    size = 28 + len(form) + 12 + len(data)
    return b"DSD " + struct.pack("<QQQ", 28, size, 0) + form + b"data" + struct.pack("<Q", 12 + len(data)) + data


def dff(seconds: float, hertz: float) -> bytes:
    """Mono DSD64 in Philips' container: bits most significant first."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack(">Q", len(content)) + content + bytes(len(content) % 2)

    kind = b"DSD \x0enot compressed\x00"
    prop = chunk(b"FS  ", struct.pack(">I", DSD_RATE)) + chunk(b"CHNL", struct.pack(">H", 1) + b"SLFT")
    prop += chunk(b"CMPR", kind)
    body = b"DSD " + chunk(b"FVER", bytes([1, 5, 0, 0])) + chunk(b"PROP", b"SND " + prop)
    return chunk(b"FRM8", body + chunk(b"DSD ", np.packbits(_one_bit(seconds, hertz)).tobytes()))


def _one_bit(seconds: float, hertz: float) -> np.ndarray:
    """A tone at half of full scale as a first-order sigma-delta stream: bool[bits]."""
    time = np.arange(round(DSD_RATE * seconds) // 32_768 * 32_768) / DSD_RATE
    total = np.floor(np.cumsum(0.5 + 0.25 * np.sin(2 * np.pi * hertz * time)))
    return np.diff(total, prepend=0) > 0


def shorten(samples: np.ndarray, rate: int) -> bytes:
    """int16[N] as Shorten version 2: every block a first difference in Rice codes."""
    bits: list[str] = []

    def unsigned(value: int, k: int) -> None:
        bits.append("0" * (value >> k) + "1" + (format(value & ((1 << k) - 1), f"0{k}b") if k else ""))

    def number(value: int) -> None:
        k = max(value.bit_length() - 1, 0)
        unsigned(k, 2)
        unsigned(value, k)

    for value in (5, 1, 256, 0, 0, 0):  # little-endian int16, channels, block, no prediction, no mean, nothing skipped
        number(value)
    wav = b"RIFF" + struct.pack("<I", 36 + 2 * len(samples)) + b"WAVEfmt "
    wav += struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data" + struct.pack("<I", 2 * len(samples))
    unsigned(9, 2)
    unsigned(len(wav), 5)
    for byte in wav:
        unsigned(byte, 8)
    k = 10
    for difference in np.diff(samples.astype(int), prepend=0)[: len(samples) // 256 * 256].reshape(-1, 256):
        unsigned(1, 2)
        unsigned(k, 3)
        for value in difference.tolist():
            unsigned(2 * value if value >= 0 else -2 * value - 1, k + 1)
    unsigned(4, 2)
    stream = "".join(bits)
    stream += "0" * (-len(stream) % 32)
    return b"ajkg\x02" + int(stream, 2).to_bytes(len(stream) // 8, "big") + bytes(64)


def silent_ape(seconds: int, rate: int = 44100) -> bytes:
    """Monkey's Audio 3.99 whose frames are flagged as silent, so that nothing is coded in them."""
    frame = struct.pack("<II", 0x80000000, 3) + bytes(16)
    table = struct.pack(f"<{seconds}I", *(76 + 4 * seconds + len(frame) * number for number in range(seconds)))
    head = b"MAC " + struct.pack("<HHIIIIIII", 3990, 0, 52, 24, len(table), 0, len(frame) * seconds, 0, 0) + bytes(16)
    head += struct.pack("<HHIIIHHI", 1000, 32, rate, rate, seconds, 16, 2, rate)
    return head + table + frame * seconds


def silent_musepack(frames: int, counted: int) -> bytes:
    """Musepack SV7 at 44.1 kHz: frames with nothing in any band, and a header that counts `counted` of them."""
    bits = "0" * 8 + (format(8, "020b") + "0" * 8) * frames
    bits += "0" * (-len(bits) % 32)
    words = np.frombuffer(int(bits, 2).to_bytes(len(bits) // 8, "big"), ">u4").astype("<u4").tobytes()
    return b"MP+\x07" + struct.pack("<I", counted) + bytes(16) + words
