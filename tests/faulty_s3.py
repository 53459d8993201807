"""A proxy in front of an S3 server that answers some requests with the faults of a bad day."""

import http.client
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from s3fs import S3FileSystem

FAULTS = ("500", "503", "dropped", "cut")
"""Server error, slow-down, no answer at all, an answer whose body breaks off half-way."""
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length", "date", "server"}

Choose = Callable[[int, str, str], str | None]


def every(interval: int, kinds: tuple[str, ...] = FAULTS) -> Choose:
    """Each `interval`-th request fails, in the ways of `kinds` by turns."""
    turns = itertools.cycle(kinds)
    return lambda number, method, path: next(turns) if number % interval == 0 else None


class FaultyS3:
    """A running proxy. `endpoint` is its address; `injected` counts the faults by kind."""

    def __init__(self, target: str, choose: Choose) -> None:
        self.injected: Counter[str] = Counter()
        self._target, self._choose = urlsplit(target), choose
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        S3FileSystem.clear_instance_cache()  # clients made meanwhile would go on asking this server

    def _next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            fault = self._choose(next(self._numbers), method, path)
            if fault:
                self.injected[fault] += 1
            return fault

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._next_fault(self.command, self.path)
                if fault == "dropped":
                    self.close_connection = True
                    return
                if fault in ("500", "503"):
                    self._reply(int(fault), {}, INTERNAL if fault == "500" else SLOW_DOWN)
                    return
                connection = http.client.HTTPConnection(proxy._target.hostname or "", proxy._target.port, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                data = reply.read()
                headers = {key: value for key, value in reply.getheaders() if key.lower() not in HOP_HEADERS}
                length = reply.getheader("Content-Length") if self.command == "HEAD" else None
                self._reply(reply.status, headers, data, length, cut=fault == "cut")
                connection.close()

            def _reply(
                self, status: int, headers: dict[str, str], data: bytes, length: str | None = None, cut: bool = False
            ) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

        return Handler


@contextmanager
def faulty_s3(target: str, choose: Choose) -> Iterator[FaultyS3]:
    """A proxy to `target` for as long as the block runs."""
    proxy = FaultyS3(target, choose)
    try:
        yield proxy
    finally:
        proxy.close()
