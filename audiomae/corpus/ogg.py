"""Ogg pages: whether they are one stream without a hole, which is what libsndfile takes for granted.

Each page names its stream, its place in it, and the sample it ends on. A stream that begins behind another, a page that
is not there, or a leap of that sample number beyond what the page's packets can hold all go unnoticed by libsndfile:
it stops at the end of the first stream, and what follows a hole is early.
"""

import io
import mmap
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

PAGE_BYTES = 65_307  # at most
READ_BYTES = 8 << 20  # files up to this size are looked through whole
MAP_BYTES = 64 << 20  # and local ones up to this; larger ones at PLACES places
PLACES = 64
STARTS = re.compile(rb"OggS\x00[\x02\x03\x06\x07]")
PAGE = struct.Struct("<4xBBqIIIB")
OPUS_MS = (10, 20, 40, 60) * 3 + (10, 20) * 2 + (2.5, 5, 10, 20) * 4
"""Frame length by the configuration number of an Opus packet."""


class OggPage(NamedTuple):
    """A page's header; `body` and `end` are offsets, `packets` how many packets end in it."""

    flags: int
    granule: int
    serial: int
    number: int
    packets: int
    body: int
    end: int


def irregular(file: BinaryIO, size: int) -> str | None:
    """Why libsndfile would not read the file right; `None` for a plain stream (and for what is no Ogg at all)."""
    if size <= READ_BYTES:
        file.seek(0)
        return _irregular(file.read())
    if size <= MAP_BYTES:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _irregular(data)
        except (io.UnsupportedOperation, AttributeError, OSError):  # no local file
            pass
    return _irregular_in_places(file, size)


def broken_off(file: BinaryIO, size: int) -> tuple[str, int] | None:
    """(why, sample it would have ended on or -1) of a last page that is not whole; `None` for a whole one."""
    file.seek(max(0, size - 2 * PAGE_BYTES))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if not page.startswith(b"OggS"):
        return None
    length = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
    granule = struct.unpack_from("<q", page, 6)[0] if len(page) >= 14 else -1
    if length > len(page):
        return f"the last page breaks off, {length - len(page)} bytes are missing", granule
    if length < len(page) and _checksum(page[:22] + bytes(4) + page[26:length]) != page[22:26]:
        return "the last page breaks off, other bytes follow", granule
    return None


def _checksum(page: bytes) -> bytes:
    """CRC-32 as Ogg has it: polynomial 0x04C11DB7, most significant bit first, no inversion."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1
        crc &= 0xFFFFFFFF
    return crc.to_bytes(4, "little")


def _pages(data: Any) -> Iterator[OggPage]:
    """Page after page, as long as one follows the other."""
    at = 0
    while at + 27 <= len(data) and data[at : at + 4] == b"OggS":
        _, flags, granule, serial, number, _, segments = PAGE.unpack_from(data, at)
        lacing = data[at + 27 : at + 27 + segments]
        body = at + 27 + segments
        at = body + sum(lacing)
        yield OggPage(flags, granule, serial, number, segments - lacing.count(b"\xff"), body, at)


def _irregular(data: Any) -> str | None:
    streams: dict[int, _LogicalStream] = {}
    begun = False
    for page in _pages(data):
        if page.flags & 2:
            if begun:
                return "several Ogg streams one after the other"
            streams[page.serial] = _LogicalStream(page, data[page.body : page.body + 40])
            continue
        begun = True
        stream = streams.get(page.serial)
        if stream is None:
            return "a page of an Ogg stream that never began"
        if why := stream.follows(page, data[page.body : page.body + 2]):
            return why
    return None


class _LogicalStream:
    """One logical stream, followed from page to page."""

    def __init__(self, first: OggPage, head: bytes) -> None:
        self._number, self._granule = first.number, -1
        self._is_opus = head.startswith(b"OpusHead")
        self._most = 0
        if head.startswith(b"\x01vorbis") and len(head) > 28:
            self._most = (1 << (head[28] >> 4)) // 2

    def follows(self, page: OggPage, packet: bytes) -> str | None:
        """Why this page is not the continuation of the last one."""
        if page.number != (self._number + 1) & 0xFFFFFFFF:
            return f"pages of the Ogg stream are missing after number {self._number}"
        self._number = page.number
        if page.granule <= 0:
            return None
        most = page.packets * self._longest(packet)
        leap = page.granule - self._granule - most if self._granule >= 0 and most else 0
        self._granule = page.granule
        return "the sample numbers of the Ogg stream leap" if leap > 0 else None

    def _longest(self, packet: bytes) -> int:
        """Samples that a packet of the page has at most; 0 where that is not known."""
        if not self._is_opus or not packet:
            return self._most
        count = {0: 1, 1: 2, 2: 2}.get(packet[0] & 3) or (packet[1] & 63 if len(packet) > 1 else 1)
        return round(OPUS_MS[packet[0] >> 3] * 48) * count


def _irregular_in_places(file: BinaryIO, size: int) -> str | None:
    """The same from pages here and there: another stream, or a sample number that went back."""
    serials: set[int] = set()
    position = -1
    for place in range(PLACES):
        file.seek(size * place // PLACES)
        data = file.read(2 * PAGE_BYTES)
        at = data.find(b"OggS\x00")
        if at < 0 or len(data) < at + 27:
            continue
        _, _, granule, serial, *_ = PAGE.unpack_from(data, at)
        if place == 0:
            serials = {PAGE.unpack_from(data, found.start())[3] for found in STARTS.finditer(data[:-27])}
        elif serial not in serials:
            return "several Ogg streams one after the other"
        elif len(serials) == 1 and granule >= 0:
            if granule < position:
                return "the sample numbers of the Ogg stream go back"
            position = granule
    return None
