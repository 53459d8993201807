"""Prometheus metrics of every replica of the API, gathered into one page.

A scrape reaches one replica; it asks its siblings, and each sample carries its replica's name, so that sums and rates
over `replica` are right. Ray's own metrics (queue lengths, batch sizes, replica counts) are on the port that
`ray start --metrics-export-port` names.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission import Lane
from serve.problems import CLIENT_GONE
from serve.quality import RecallShadow

REQUEST_ID = "x-request-id"
QUIET = ("/healthz", "/readyz", "/metrics")
BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class ApiMetrics:
    """Counters and histograms of one API replica."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._replica = replica
        self._requests = Counter(
            "audiomae_requests",
            "Requests by route and status.",
            ("replica", "method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "audiomae_request_seconds",
            "Time from the first byte to the last.",
            ("replica", "route"),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._refused = Counter(
            "audiomae_proxy_refused",
            "Uploads that HAProxy refused in a storm, about; they are not among the requests.",
            ("replica",),
            registry=self.registry,
        )
        self._stages = Histogram(
            "audiomae_stage_seconds",
            "Time in decode, encode and search.",
            ("replica", "stage"),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._shadow = Gauge(
            "audiomae_recall_shadow",
            "Queries searched again exactly; hits that this found, and how many of them had been answered.",
            ("replica", "count"),
            registry=self.registry,
        )
        self._lanes = Gauge(
            "audiomae_lane_requests",
            "Requests at work and waiting in each lane.",
            ("replica", "lane", "state"),
            registry=self.registry,
        )
        self._shards = Gauge(
            "audiomae_shards",
            "Shards of the index that answer, and that do not.",
            ("replica", "state"),
            registry=self.registry,
        )
        self._release = Gauge(
            "audiomae_release_rows",
            "Rows of the release being served.",
            ("replica", "version", "fingerprint"),
            registry=self.registry,
        )

        # a look at a label's counter takes longer than to count
        self._counted = functools.cache(lambda *labels: self._requests.labels(replica, *labels))
        self._timed = functools.cache(lambda route: self._seconds.labels(replica, route))
        self._staged = functools.cache(lambda stage: self._stages.labels(replica, stage))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._counted(method, route, str(status)).inc()
        self._timed(route).observe(seconds)

    def refused_by_proxy(self, count: int) -> None:
        """Count uploads that never came this far."""
        self._refused.labels(self._replica).inc(count)

    def stages(self, milliseconds: dict[str, float]) -> None:
        """Record where a query's time went."""
        for stage, value in milliseconds.items():
            if value and stage != "total":
                self._staged(stage).observe(value / 1000)

    def serving(self, version: str, fingerprint: str, rows: int) -> None:
        """Record which release is being served."""
        self._release.clear()
        self._release.labels(self._replica, version, fingerprint).set(rows)

    def lanes(self, lanes: Iterable[Lane]) -> None:
        """Record how full the lanes are."""
        for lane in lanes:
            self._lanes.labels(self._replica, lane.name, "working").set(lane.working)
            self._lanes.labels(self._replica, lane.name, "waiting").set(lane.waiting)

    def recall(self, shadow: RecallShadow) -> None:
        """Record what the recall shadow has counted."""
        for name in ("queries", "wanted", "found"):
            self._shadow.labels(self._replica, name).set(getattr(shadow, name))

    def shards(self, count: int, missing: int) -> None:
        """Record how many shards there are, and how many of them are missing."""
        self._shards.labels(self._replica, "answering").set(count - missing)
        self._shards.labels(self._replica, "missing").set(missing)

    def text(self) -> str:
        """This replica's metrics in the Prometheus text format."""
        return generate_latest(self.registry).decode()


class CountRequests:
    """ASGI middleware that times, counts and logs every request; `request.state.started` is its start. Answers HEAD."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, note: Callable[[dict[str, Any]], None]) -> None:
        self._app, self._metrics, self._note = app, metrics, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        scope = {**scope, "state": {**scope.get("state", {}), "started": started}}
        status, method = 500, scope["method"]
        head = method == "HEAD"
        if head:  # answered as GET, without the content
            scope["method"] = "GET"
        request_id = Headers(scope=scope).get(REQUEST_ID) or uuid.uuid4().hex  # Serve gives and returns one

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(method, route, status, seconds)
            if route not in QUIET:
                stages_ms = scope["state"].get("stages_ms")
                self._note(line_of(request_id, method, scope["path"], status, seconds, stages_ms))


def line_of(request_id: str, method: str, path: str, status: int, seconds: float, stages_ms: Any) -> dict[str, Any]:
    """What the log says of a request, with the time of each stage in milliseconds."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "method": method,
        "path": path,
        "status": status,
        "ms": round(seconds * 1000, 3),
        "stages_ms": stages_ms,
    }


def merge(texts: Iterable[str]) -> bytes:
    """Several replicas' metrics as one page: each family once, with the samples of all."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)
    registry = CollectorRegistry()
    registry.register(_Collected(list(families.values())))
    return generate_latest(registry)


class _Collected:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
