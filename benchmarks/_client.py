"""An HTTP client that costs little, for load on the machine that also serves: requests are bytes made once.

What a client takes of the CPUs is missing in what it measures: an upload of 160 kB that is refused costs a general
client about a millisecond, several times what it costs the service. So there is nothing here but sockets (uvloop) and
the parser of uvicorn and Node.js (httptools).
"""

import asyncio
from typing import Any, NamedTuple

import httptools


class Reply(NamedTuple):
    """Status, headers (names in lower case) and size in bytes of an answer; status 0: it broke off."""

    status: int
    headers: dict[str, str]
    size: int


BROKEN = Reply(0, {}, 0)


def get(path: str) -> bytes:
    """A request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post(path: str, body: bytes, kind: str) -> bytes:
    """A request with a body of that content type."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def post_file(path: str, data: bytes) -> bytes:
    """A request with a form that holds a file."""
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="clip"\r\n\r\n'
    return post(path, head + data + b"\r\n--B--\r\n", "multipart/form-data; boundary=B")


class Client:
    """Asks one service; connections are kept and used again.

    Args:
        port: of the service, on this machine.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes) -> Reply:
        """The answer to a request; `BROKEN` when the connection ends before it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                break
        else:
            try:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
            except OSError:
                return BROKEN
        reply = await connection.ask(request)
        if connection.is_open:
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        """End all connections."""
        for connection in self._idle:
            connection.transport.close()


class _Connection(asyncio.Protocol):
    """One request at a time; the names of the methods are those that asyncio and httptools call."""

    def __init__(self) -> None:
        self.is_open = True
        self.transport: Any = None
        self._answer: asyncio.Future[Reply] | None = None
        self._parser: Any = None
        self._headers: dict[str, str] = {}
        self._size = 0

    async def ask(self, request: bytes) -> Reply:
        self._answer = asyncio.get_running_loop().create_future()
        self._parser, self._headers, self._size = httptools.HttpResponseParser(self), {}, 0
        self.transport.write(request)
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._size += len(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive() or self.transport.get_write_buffer_size():
            self.is_open = False
            self.transport.close()
        self._finish(Reply(self._parser.get_status_code(), self._headers, self._size))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._finish(BROKEN)

    def _finish(self, reply: Reply) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(reply)
