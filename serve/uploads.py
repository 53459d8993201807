"""Request bodies: never larger than allowed, whatever their headers say."""

from fastapi import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import Problem


class LimitBody:
    """ASGI middleware that refuses bodies above `max_bytes`: at once by Content-Length, else when they run over."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._problem(int(declared)).response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._problem(received)
            return message

        await self._app(scope, counted, send)

    def _problem(self, size: int) -> Problem:
        return Problem(
            413,
            "upload_too_large",
            f"the request body has at least {size:,} bytes; this service takes {self._max_bytes:,}: "
            "send a shorter or compressed clip, or raise max_upload_mib",
        )


async def read_upload(file: UploadFile) -> bytes:
    """The uploaded file; 422 `empty_upload` when there is nothing in it."""
    data = await file.read()
    if not data:
        raise Problem(422, "empty_upload", f"the uploaded file {file.filename!r} is empty; send an audio file")
    return data
