"""What the bytes of a file say before a decoder is let near it: lengths that cannot be true, streams joined end to end.

libsndfile believes a header's length and stops at the first stream's end. `inspect` reads the few bytes that tell: it
corrects a length that a dead recorder or a pipe left behind, says how many bytes a header promises in vain, and names
the files whose whole length only FFmpeg reads.
"""

import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from audiomae.corpus import ogg

HEAD_BYTES = 16 << 10
MAX_CHUNKS = 256
MUSEPACK_FRAME_BYTES = 3  # at least
UNKNOWN_BYTES = 0x7FFFF000  # and above: a pipe's "I do not know yet"

# what a file begins with, of formats that may come without a decoder
NAMES = {
    b"OFR ": "OptimFROG",
    b"LA0": "La (Lossless Audio)",
    b"MThd": "MIDI (notes, no sound)",
    b"ADIF": "AAC in ADIF",
    b"MAC ": "Monkey's Audio",
    b"ajkg": "Shorten",
    b"DSD ": "DSD in DSF",
    b"FRM8": "DSD in DSDIFF",
    b"MP+": "Musepack",
    b"MPCK": "Musepack",
    b"SHRT": "Shorten",
    b"RKA": "RK Audio",
    b"LPAC": "LPAC",
    b".ra\xfd": "RealAudio",
    b"caff": "CAF",
    b"wvpk": "WavPack",
    b"TTA": "True Audio",
    b"tBaK": "TAK",
}


@dataclass
class Facts:
    """What `inspect` found. Everything is `None`, empty or false for an ordinary file."""

    missing: str | None = None
    """Why the file is shorter than its header says, for a person."""
    promised: float | None = None
    """How many times the bytes of samples that are there the header declares; more than 1."""
    granule: int | None = None
    """The sample that the last, broken page of an Ogg file would have ended on."""
    joined: str | None = None
    """Why libsndfile would not read the file to its end."""
    empty: bool = False
    """It declares no samples, and what follows is well-formed and none."""
    patches: dict[int, bytes] = field(default_factory=dict)
    """Bytes to put over the header, by offset."""


def format_name(file: BinaryIO) -> str | None:
    """The name of the sound format that a file begins like; `None` for what is not known here."""
    file.seek(0)
    head = file.read(8)
    return next((name for magic, name in NAMES.items() if head.startswith(magic)), None)


def inspect(file: BinaryIO, size: int) -> Facts:
    """Look at the head (and, where it tells more, the tail) of a file of `size` bytes. Moves the file's position."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    kind = head[:4], head[8:12]
    if kind[0] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and kind[1] == b"WAVE":
        return _wav(file, head, size)
    if kind in ((b"FORM", b"AIFF"), (b"FORM", b"AIFC")):
        return _aiff(file, head, size)
    if head[:4] == b".snd" and len(head) >= 24:
        return _au(head, size)
    if head[:8] == b"caff\x00\x01\x00\x00":
        return _caf(file, head, size)
    if head[:16] == W64_RIFF:
        return _w64(file, head, size)
    if head[:4] == b"OggS":
        return _ogg(file, size)
    if head[:4] == b"fLaC":
        return _flac(file, head, size)
    if head[:3] == b"MP+" and len(head) >= 24 and head[4:8] == bytes(4):
        return Facts(patches={4: struct.pack("<I", min(size // MUSEPACK_FRAME_BYTES + 1, 1 << 20))})
    return Facts()


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    at: int
    """Of its content."""
    length: int


def _chunks(file: BinaryIO, head: bytes, size: int, layout: struct.Struct, start: int, pad: int = 2) -> list[_Chunk]:
    """The chunks from `start` on, up to the one that holds samples or reaches the end of the file."""
    found: list[_Chunk] = []
    at, step = start, layout.size
    while at + step <= size and len(found) < MAX_CHUNKS:
        if at + step <= len(head):
            raw = head[at : at + step]
        else:
            file.seek(at)
            raw = file.read(step)
        if len(raw) < step:
            break
        name, length = layout.unpack(raw)
        found.append(_Chunk(name, at + step, length))
        if name in (b"data", b"SSND", W64_DATA):
            break
        at += step + length + -length % pad
    return found


def _samples(chunks: list[_Chunk], name: bytes) -> _Chunk | None:
    return chunks[-1] if chunks and chunks[-1].name == name else None


def _length(declared: int, at: int, size: int, least: int = 0) -> tuple[Facts, int | None]:
    """The facts about a declared length of samples that start at byte `at`, and the length to write over it."""
    there = max(0, size - at)
    if declared <= least:
        return Facts(), there if there > least else None
    if declared >= UNKNOWN_BYTES and declared > there:
        return Facts(), there
    if declared <= there:
        return Facts(), None
    text = f"the header declares {declared} bytes of samples, {there} are there"
    return Facts(missing=text, promised=(declared - least) / max(1, there - least)), None


RIFF_CHUNK, RIFX_CHUNK, CAF_CHUNK = struct.Struct("<4sI"), struct.Struct(">4sI"), struct.Struct(">4sq")


def _wav(file: BinaryIO, head: bytes, size: int) -> Facts:
    layout = RIFX_CHUNK if head[:4] == b"RIFX" else RIFF_CHUNK
    chunks = _chunks(file, head, size, layout, 12)
    data = _samples(chunks, b"data")
    if data is None:
        return Facts()
    ds64 = next((chunk.at for chunk in chunks if chunk.name == b"ds64" and chunk.at + 24 <= len(head)), None)
    declared = data.length
    if ds64 is not None and declared == 0xFFFFFFFF:
        declared = struct.unpack_from("<Q", head, ds64 + 8)[0]
    if data.length == 0 and _only_chunks(file, data.at, size, layout):
        return Facts(empty=True)
    facts, length = _length(declared, data.at, size)
    if length is None:
        return facts
    if ds64 is not None:
        facts.patches[ds64] = struct.pack("<QQ", size - 8, length)
    short = layout.format.lstrip("<>")[-1:]
    order = layout.format[0]
    facts.patches[data.at - 4] = struct.pack(order + short, length if ds64 is None and length < 2**32 else 0xFFFFFFFF)
    if ds64 is None:
        facts.patches[4] = struct.pack(order + short, min(size - 8, 0xFFFFFFFF))
    return facts


def _only_chunks(file: BinaryIO, at: int, size: int, layout: struct.Struct) -> bool:
    """Whether nothing but well-formed chunks lies between `at` and the end of the file."""
    for _ in range(MAX_CHUNKS):
        if at >= size:
            return True
        file.seek(at)
        raw = file.read(8)
        if len(raw) < 8 or not all(32 <= byte < 127 for byte in raw[:4]):
            return False
        length = layout.unpack(raw)[1]
        at += 8 + length + (length & 1)
        if at > size + 1:
            return False
    return False


def _aiff(file: BinaryIO, head: bytes, size: int) -> Facts:
    chunks = _chunks(file, head, size, RIFX_CHUNK, 12)
    data = _samples(chunks, b"SSND")
    if data is None:
        return Facts()
    if data.length == 0 and _only_chunks(file, data.at, size, RIFX_CHUNK):
        return Facts(empty=True)
    facts, length = _length(data.length, data.at, size, least=8)
    if length is None:
        return facts
    facts.patches = {4: struct.pack(">I", size - 8), data.at - 4: struct.pack(">I", min(length, 0xFFFFFFFF))}
    common = next((chunk for chunk in chunks if chunk.name == b"COMM" and chunk.at + 8 <= len(head)), None)
    if common is not None:
        channels, _, bits = struct.unpack_from(">HIH", head, common.at)
        block = channels * -(-bits // 8)
        facts.patches[common.at + 2] = struct.pack(">I", min((length - 8) // max(1, block), 0xFFFFFFFF))
    return facts


def _au(head: bytes, size: int) -> Facts:
    at, declared = struct.unpack_from(">II", head, 4)
    facts, length = _length(declared, at, size)
    if length is not None:
        facts.patches[8] = struct.pack(">I", min(length, 0xFFFFFFFF))
    return facts


def _caf(file: BinaryIO, head: bytes, size: int) -> Facts:
    data = _samples(_chunks(file, head, size, CAF_CHUNK, 8, pad=1), b"data")
    if data is None:
        return Facts()
    declared = data.length if data.length >= 0 else 0xFFFFFFFF
    facts, length = _length(declared, data.at, size, least=4)
    if length is not None:
        facts.patches[data.at - 8] = struct.pack(">q", length)
    return facts


W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
W64_CHUNK = struct.Struct("<16sQ")


def _w64(file: BinaryIO, head: bytes, size: int) -> Facts:
    at = 40
    while at + 24 <= len(head):
        name, length = W64_CHUNK.unpack_from(head, at)
        if name == W64_DATA:
            unknown = length >= 2**63
            facts, patch = _length(0 if unknown else length, at, size, least=24)
            if patch is not None:
                facts.patches = {16: struct.pack("<Q", size), at + 16: struct.pack("<Q", patch)}
            return facts
        at += max(24, length) + -length % 8
    return Facts()


# --- Ogg, FLAC and MP3 ------------------------------------------------------------------------------------------------


def _ogg(file: BinaryIO, size: int) -> Facts:
    facts = Facts(joined=ogg.irregular(file, size))
    if cut := ogg.broken_off(file, size):
        facts.missing = cut[0]
        facts.granule = cut[1] if cut[1] > 0 else None
    return facts


def _flac(file: BinaryIO, head: bytes, size: int) -> Facts:
    """A stream that says it has no samples, or fewer than its last frames are numbered."""
    if len(head) < 26 or head[4] & 0x7F:
        return Facts()
    total = int.from_bytes(head[21:26], "big") & 0xFFFFFFFFF
    file.seek(max(0, size - 4 * HEAD_BYTES))
    tail = file.read()
    place = len(tail)
    for _ in range(64):
        place = max(tail.rfind(b"\xff\xf8", 0, place), tail.rfind(b"\xff\xf9", 0, place))
        if place < 0:
            break
        frame = flac_frame(tail[place : place + 16], int.from_bytes(head[10:12], "big"))
        if frame is not None:
            wrong = sum(frame) > total
            return Facts(joined=f"its header counts {total} samples, there are {sum(frame)}" if wrong else None)
    return Facts()


def flac_frame(header: bytes, block: int) -> tuple[int, int] | None:
    """(number of its first sample, samples) of the FLAC frame that starts with these 16 bytes; `None` if none does.

    Args:
        block: samples per frame of a stream with frames of one size (its STREAMINFO has it).
    """
    if len(header) < 16 or header[0] != 0xFF or header[1] & 0xFE != 0xF8:
        return None
    size_code, rate_code = header[2] >> 4, header[2] & 15
    ones = 8 - (header[4] ^ 0xFF).bit_length()  # the number is coded as UTF-8 codes characters
    more = max(0, ones - 1)
    if size_code == 0 or rate_code == 15 or header[3] & 1 or ones in (1, 8):
        return None
    number = header[4] & 0x7F >> ones
    for byte in header[5 : 5 + more]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    extra = {6: 1, 7: 2}.get(size_code, 0)
    end = 5 + more + extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if len(header) <= end or _crc8(header[:end]) != header[end]:
        return None
    if extra:
        count = 1 + int.from_bytes(header[5 + more : 5 + more + extra], "big")
    else:
        count = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    return (number if header[1] & 1 else number * block), count


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 7 if crc & 0x80 else crc << 1) & 0xFF
    return crc


def has_mp3_length(file: BinaryIO) -> bool:
    """Whether an MP3 says how long it is in the way libsndfile knows: Xing or Info. Keeps the file's position."""
    position = file.tell()
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    file.seek(start)
    head = file.read(4096)
    file.seek(position)
    return b"Xing" in head or b"Info" in head


def has_mp3_frame(data: bytes) -> bool:
    """Whether MPEG audio goes on in `data`: two frame headers in a row that agree."""
    at = data.find(b"\xff")
    while 0 <= at < len(data) - 4:
        length = mp3_frame_bytes(data[at : at + 4])
        if length and (
            at + length == len(data)
            or (mp3_frame_bytes(data[at + length : at + length + 4]) and data[at + length + 1] == data[at + 1])
        ):
            return True
        at = data.find(b"\xff", at + 1)
    return False


def mp3_frame_bytes(header: bytes) -> int:
    """Bytes of the layer III frame with this header of 4 bytes; 0 where it is none (or of free bit rate)."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    rate_code, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer != 1 or rate_code in (0, 15) or rate == 3:
        return 0
    rates = (
        (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
        if version == 3
        else (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    )
    sample_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * rates[rate_code] * 1000 // sample_rate + (header[2] >> 1 & 1)
