"""Errors as problem JSON (RFC 9457): every failure has an HTTP status, a stable `code` and a sentence for a person."""

from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve.proxy import problem
from serve.schema import ProblemBody

MEDIA_TYPE = "application/problem+json"


class Problem(HTTPException):
    """A request that cannot be answered.

    It is an `HTTPException`, so FastAPI lets it through even when it is raised while the body is being read.

    Args:
        status: HTTP status.
        code: stable machine-readable name; clients branch on it, so it never changes.
        detail: what was wrong, what was got and what was expected.
        extra: further members of the JSON object.
        headers: response headers, for example `Retry-After`.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(status, detail, headers)
        self.code, self.extra = code, extra

    def response(self) -> Response:
        """The problem as an `application/problem+json` response."""
        body = {**problem(self.status_code, self.code, self.detail), **self.extra}
        return Response(orjson.dumps(body, default=str), self.status_code, self.headers, media_type=MEDIA_TYPE)


class ClientGone(Exception):
    """The client left before it had sent all of its request; nobody waits for the answer."""


CLIENT_GONE = 499  # nginx's number for it


def invalid(errors: list[Any]) -> Problem:
    """422 `invalid_request` from what pydantic found."""
    found = [{"where": ".".join(str(part) for part in item["loc"]), "message": item["msg"]} for item in errors]
    detail = "; ".join(f"{item['where']}: {item['message']}" for item in found[:5])
    return Problem(422, "invalid_request", detail.encode(errors="replace").decode(), errors=found[:50])


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that can fail with these statuses, for OpenAPI."""
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemBody.__name__}"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


_CODES = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}


def install(app: FastAPI) -> None:
    """Make every error of `app`, framework errors included, a problem."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Problem):
            return error.response()
        code = _CODES.get(error.status_code, "http_error")
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return Problem(error.status_code, code, detail, headers=dict(error.headers or {})).response()

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def bad_request(request: Request, error: RequestValidationError) -> Response:
        return invalid(list(error.errors())).response()

    @app.exception_handler(ValidationError)
    async def bad_body(request: Request, error: ValidationError) -> Response:
        return invalid(list(error.errors(include_input=False, include_context=False, include_url=False))).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        detail = f"unexpected {type(error).__name__}; the service's log has the traceback"
        return Problem(500, "internal_error", detail).response()
