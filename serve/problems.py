"""Errors as problem JSON (RFC 9457): every failure has an HTTP status, a stable `code` and a sentence for a person."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response


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
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status_code).phrase,
            "status": self.status_code,
            "code": self.code,
            "detail": self.detail,
            **self.extra,
        }
        return JSONResponse(body, self.status_code, self.headers, media_type="application/problem+json")


_CODES = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}


def install(app: FastAPI) -> None:
    """Make every error of `app`, framework errors included, a problem."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Problem):
            return error.response()
        code = _CODES.get(error.status_code, "http_error")
        return Problem(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = [
            {"where": ".".join(str(part) for part in item["loc"]), "message": item["msg"]} for item in error.errors()
        ]
        detail = "; ".join(f"{item['where']}: {item['message']}" for item in errors[:5])
        return Problem(422, "invalid_request", detail, errors=errors[:50]).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        detail = f"unexpected {type(error).__name__}; the service's log has the traceback"
        return Problem(500, "internal_error", detail).response()
