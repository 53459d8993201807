"""Request headers and bodies within limits: never larger than allowed, whatever they say, and never slower."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.arguments import ServeArgs
from serve.problems import ClientGone, Problem

MAX_FIELDS, MAX_FIELD_BYTES = 64, 1 << 20
BODIES_MIB = 512.0  # of all bodies that one API replica holds at a time
DRAIN_S = 5.0


class Limits:
    """ASGI middleware around every route.

    - 431 when the headers are larger than `max_header_kib`;
    - 413 when the body is larger than `max_upload_mib`: at once by Content-Length, else when it runs over;
    - 408 when the body stands still for `body_patience_s`, or comes more slowly than `min_upload_kib_s` on average;
    - 503 when too many bodies are being held already.

    A body is received before its request takes any place in a queue, so slow clients keep nobody waiting.
    """

    def __init__(self, app: ASGIApp, args: ServeArgs) -> None:
        self._app, self._args = app, args
        self._max_bytes = int(args.max_upload_mib * 2**20)
        self._max_header_bytes = int(args.max_header_kib * 1024)
        self._budget = max(self._max_bytes * 4, int(BODIES_MIB * 2**20))
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
        except Problem as problem:
            await drain(receive, self._max_bytes)
            await problem.response()(scope, receive, send)
            return
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._held -= body.size

    def _check_headers(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if size > self._max_header_bytes:
            detail = f"the request line and headers have {size:,} bytes; this service takes {self._max_header_bytes:,}"
            raise Problem(431, "headers_too_large", detail)
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise self.too_large(int(declared))

    def hold(self, size: int) -> None:
        """Count `size` more bytes in memory. Raises 503 when there are too many."""
        if self._held + size > self._budget:
            headers = {"Retry-After": "2"}
            raise Problem(503, "overloaded", "too many uploads are being received; try again in 2 s", headers=headers)
        self._held += size

    def too_large(self, size: int) -> Problem:
        """413 for a body of at least `size` bytes."""
        return Problem(
            413,
            "upload_too_large",
            f"the request body has at least {size:,} bytes; this service takes {self._max_bytes:,}: "
            "send a shorter or compressed clip, or raise max_upload_mib",
        )

    def check_size(self, size: int) -> None:
        """Raises 413 when a body has grown over the limit."""
        if size > self._max_bytes:
            raise self.too_large(size)

    def patience_s(self, started: float, size: int) -> float:
        """How much longer to wait for the next piece of a body; negative when it is too slow."""
        args = self._args
        allowed = args.body_patience_s + size / (args.min_upload_kib_s * 1024)
        return min(args.body_patience_s, started + allowed - time.monotonic())

    def too_slow(self, size: int) -> Problem:
        """408 for a body of which only `size` bytes came."""
        return Problem(
            408,
            "body_timeout",
            f"{size:,} bytes of the request body came, then too little: expected all of it without a pause of "
            f"{self._args.body_patience_s:g} s and at {self._args.min_upload_kib_s:g} KiB/s or more",
            headers={"Connection": "close"},
        )


class _Body:
    """The body of one request on its way in."""

    def __init__(self, limits: Limits, receive: Receive) -> None:
        self._limits, self._receive = limits, receive
        self.size = 0
        self._started: float | None = None
        self._whole = False
        self._spread = random.uniform(0.75, 1.25)  # so that clients stalled together are not given up in one burst

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()  # a disconnect, whenever it comes
        if self._started is None:
            self._started = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._limits.patience_s(self._started, self.size) * self._spread)):
                message = await self._receive()
        except TimeoutError:
            raise self._limits.too_slow(self.size) from None
        if message["type"] == "http.request":
            piece = len(message.get("body", b""))
            self._limits.hold(piece)
            self.size += piece
            self._limits.check_size(self.size)
            self._whole = not message.get("more_body", False)
        return message


async def drain(receive: Receive, max_bytes: int) -> None:
    """Take in and drop what is left of a body, so that the client reads the answer instead of a reset connection."""
    seen = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while seen <= max_bytes:
                message = await receive()
                seen += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def read_body(request: Request) -> bytes:
    """The whole body of a request.

    Raises:
        ClientGone: the client left before the end.
    """
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGone from None


@dataclass
class Form:
    """A parsed form: plain fields by name, and files by name."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def parse_form(body: bytes, content_type: str) -> Form:
    """Parse a form of files and fields from memory.

    Raises:
        Problem: 422 `invalid_request`: not a form, or a broken one.
    """
    kind, options = parse_options_header(content_type)
    form = Form()
    try:
        if kind == b"multipart/form-data" and options.get(b"boundary"):
            _Parts(form, options[b"boundary"]).parse(body)
        elif kind == b"application/x-www-form-urlencoded":
            _parse_urlencoded(form, body)
        else:
            detail = f"expected multipart/form-data with a field `file`, got content type {content_type[:100]!r}"
            raise Problem(422, "invalid_request", detail)
    except (FormParserError, UnicodeDecodeError) as error:
        raise Problem(422, "invalid_request", f"the form cannot be read: {error}") from None
    return form


class _Parts:
    """Callbacks of the multipart parser that fill a form."""

    def __init__(self, form: Form, boundary: bytes) -> None:
        self._form = form
        self._header, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []  # of the part: nearly always one, and then it is not copied again
        self._complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_part_data": lambda data, start, end: self._pieces.append(data[start:end]),
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def parse(self, body: bytes) -> None:
        self._parser.write(body)
        self._parser.finalize()
        if not self._complete:
            raise FormParserError("it ends before its closing boundary")

    def _part_begin(self) -> None:
        self._headers, self._pieces = {}, []

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name, data = options.get(b"name", b"").decode("utf-8", "replace"), b"".join(self._pieces)
        if len(self._form.fields) + len(self._form.files) >= MAX_FIELDS:
            raise FormParserError(f"more than {MAX_FIELDS} fields")
        if b"filename" in options or name == "file":
            self._form.files[name] = data
        elif len(data) > MAX_FIELD_BYTES:
            raise FormParserError(f"field {name!r} has {len(data):,} bytes, at most {MAX_FIELD_BYTES:,}")
        else:
            self._form.fields[name] = data.decode()

    def _end(self) -> None:
        self._complete = True


def _parse_urlencoded(form: Form, body: bytes) -> None:
    if len(body) > MAX_FIELD_BYTES:
        raise FormParserError(f"a form of {len(body):,} bytes without files, at most {MAX_FIELD_BYTES:,}")
    try:
        form.fields.update(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError as error:
        raise FormParserError(str(error)) from None
