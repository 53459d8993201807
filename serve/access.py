"""Who may ask: the administrator's token, and optional tokens with quotas for everybody else."""

import hmac
import os
import time
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.problems import Problem
from serve.uploads import drain

ADMIN_VARIABLE = "AUDIOMAE_ADMIN_TOKEN"
TOKENS_VARIABLE = "AUDIOMAE_API_TOKENS"
OPEN_PATHS = ("/healthz", "/readyz", "/admin/reload")  # probes have no token; the administrator has another
BURST_S = 10.0  # a quota may be used up to this many seconds ahead
DRAIN_BYTES = 64 << 20


def require_admin(authorization: str | None) -> None:
    """403 when the service has no admin token, 401 when the caller's is missing or wrong."""
    expected = os.environ.get(ADMIN_VARIABLE)
    if not expected:
        raise Problem(403, "admin_disabled", f"set {ADMIN_VARIABLE} in the service's environment to use /admin")
    if not hmac.compare_digest(bearer(authorization).encode(), expected.encode()):
        raise unauthorized("the admin token")


def bearer(authorization: str | None) -> str:
    """The token of an `Authorization: Bearer TOKEN` header; empty when there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def unauthorized(what: str) -> Problem:
    """401."""
    headers = {"WWW-Authenticate": "Bearer"}
    return Problem(401, "unauthorized", f"expected `Authorization: Bearer TOKEN` with {what}", headers=headers)


@dataclass
class Quota:
    """A token bucket: `per_s` requests a second, some of them ahead."""

    per_s: float
    left: float = 0.0
    seen_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = max(1.0, self.per_s * BURST_S)

    def take(self) -> float:
        """Use one request; 0, or the seconds to wait for it."""
        now = time.monotonic()
        self.left = min(max(1.0, self.per_s * BURST_S), self.left + (now - self.seen_at) * self.per_s)
        self.seen_at = now
        if self.left < 1.0:
            return (1.0 - self.left) / self.per_s
        self.left -= 1.0
        return 0.0


def read_tokens(text: str) -> dict[str, Quota]:
    """`TOKEN=REQUESTS_PER_S, ...` as quotas; a token without a number has none to speak of.

    Raises:
        ValueError: a quota that is not a positive number.
    """
    quotas = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        token, _, rate = entry.partition("=")
        per_s = float(rate) if rate else 1e9
        if not per_s > 0:
            raise ValueError(f"{TOKENS_VARIABLE}: {token[:4]}...={rate}: expected requests a second above 0")
        quotas[token] = Quota(per_s)
    return quotas


class Tokens:
    """ASGI middleware: with `AUDIOMAE_API_TOKENS` in the environment every route but probes needs one of the tokens.

    A quota holds for one API replica.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._quotas = read_tokens(os.environ.get(TOKENS_VARIABLE, ""))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._quotas or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        problem = self._check(bearer(Headers(scope=scope).get("authorization")))
        if problem is None:
            await self._app(scope, receive, send)
            return
        await drain(receive, DRAIN_BYTES)
        await problem.response()(scope, receive, send)

    def _check(self, token: str) -> Problem | None:
        for known, quota in self._quotas.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                wait = quota.take()
                if not wait:
                    return None
                seconds = str(max(1, round(wait + 0.5)))
                detail = f"this token may send {quota.per_s:g} requests a second; try again in {seconds} s"
                return Problem(429, "quota_exceeded", detail, headers={"Retry-After": seconds})
        return unauthorized("a token of this service")
