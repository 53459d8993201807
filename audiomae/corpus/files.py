"""Binary files with something between them and the C libraries: errors remembered, header bytes put right."""

import io
import os
from typing import Any, BinaryIO


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


class Patched(io.RawIOBase):
    """A binary file with some bytes of it replaced; the file itself is left alone."""

    def __init__(self, file: BinaryIO, patches: dict[int, bytes]) -> None:
        self._file, self._patches = file, patches
        self.name = getattr(file, "name", "stream")

    @property
    def error(self) -> Any:
        return getattr(self._file, "error", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = self._file.read(size)
        if not data or all(at >= start + len(data) or at + len(new) <= start for at, new in self._patches.items()):
            return data
        out = bytearray(data)
        for at, new in self._patches.items():
            for offset, byte in enumerate(new, start=at - start):
                if 0 <= offset < len(out):
                    out[offset] = byte
        return bytes(out)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
