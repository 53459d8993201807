"""Metrics of several replicas as one Prometheus page; bodies that are never larger than allowed."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve import problems
from serve.arguments import ServeArgs
from serve.metrics import ApiMetrics, CountRequests, merge
from serve.uploads import Limits, read_body

ARGS = ServeArgs(index="unused", max_upload_mib=1000 / 2**20, max_header_kib=1, body_patience_s=0.2)


def samples(page: bytes) -> dict[tuple[str, str], float]:
    """(metric, replica) -> sum over the other labels."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = (sample.name, sample.labels["replica"])
            found[key] = found.get(key, 0) + sample.value
    return found


def test_replicas_are_merged_into_one_page() -> None:
    first, second = ApiMetrics("one"), ApiMetrics("two")
    first.request("POST", "/search", 200, 0.1)
    first.request("GET", "/release", 200, 0.1)
    second.request("POST", "/search", 503, 0.3)
    second.stages({"decode": 10.0, "encode": 20.0, "search": 0.0, "total": 99.0})
    second.serving("v1", "f", 7)
    second.serving("v2", "f", 12)
    page = merge([first.text(), second.text()])
    assert page.count(b"# TYPE audiomae_requests_total counter") == 1
    found = samples(page)
    assert found["audiomae_requests_total", "one"] == 2
    assert found["audiomae_requests_total", "two"] == 1
    assert found["audiomae_stage_seconds_count", "two"] == 2
    assert found["audiomae_stage_seconds_sum", "two"] == pytest.approx(0.03)
    assert found["audiomae_release_rows", "two"] == 12


def application(metrics: ApiMetrics, log: list[dict[str, Any]] | None = None) -> FastAPI:
    app, note = FastAPI(), ([] if log is None else log).append
    app.add_middleware(Limits, args=ARGS)
    app.add_middleware(CountRequests, metrics=metrics, note=note)
    problems.install(app)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.get("/fail")
    async def fail() -> None:
        raise RuntimeError("boom")

    return app


def body(size: int) -> Iterator[bytes]:
    """A body whose length is not declared beforehand."""
    for start in range(0, size, 100):
        yield b"x" * min(100, size - start)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413), (50_000, 413)])
def test_bodies_are_limited_whatever_their_headers_say(size: int, status: int, declared: bool) -> None:
    metrics = ApiMetrics("one")
    with TestClient(application(metrics)) as client:
        reply = client.post("/echo", content=b"x" * size if declared else body(size))
    assert reply.status_code == status
    if status == 413:
        assert reply.json()["code"] == "upload_too_large"
        assert reply.headers["content-type"] == "application/problem+json"
    else:
        assert reply.text == str(size)
    assert f'status="{status}"' in metrics.text()


def test_a_crash_counts_as_500() -> None:
    metrics, log = ApiMetrics("one"), list[dict[str, Any]]()
    with TestClient(application(metrics, log), raise_server_exceptions=False) as client:
        reply = client.get("/fail", headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert [(line["request_id"], line["path"], line["status"]) for line in log] == [("mine", "/fail", 500)]
    assert 'route="/fail",status="500"' in metrics.text()


def test_long_headers_are_refused() -> None:
    with TestClient(application(ApiMetrics("one"))) as client:
        reply = client.post("/echo", content=b"x", headers={"x-long": "y" * 2000})
    assert (reply.status_code, reply.json()["code"]) == (431, "headers_too_large")


def test_head_is_get_without_the_content() -> None:
    app = application(ApiMetrics("one"))

    @app.get("/five")
    async def five() -> int:
        return 12345

    with TestClient(app) as client:
        reply = client.head("/five")
    assert (reply.status_code, reply.content, reply.headers["content-length"]) == (200, b"", "5")


def test_a_stalled_body_is_given_up() -> None:
    """The client sends five bytes of a hundred, then nothing."""
    sent: list[dict[str, Any]] = []
    pieces = iter([{"type": "http.request", "body": b"12345", "more_body": True}])

    async def receive() -> dict[str, Any]:
        for piece in pieces:
            return piece
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/echo", "raw_path": b"/echo", "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 2)}
    metrics = ApiMetrics("one")
    asyncio.run(application(metrics)(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408 and b"body_timeout" in sent[1]["body"]
    assert 'route="/echo",status="408"' in metrics.text()


def test_a_client_that_leaves_is_no_error_of_ours() -> None:
    pieces = iter([{"type": "http.request", "body": b"1", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(pieces)

    async def send(message: Any) -> None:
        pass

    app = application(metrics := ApiMetrics("one"))

    @app.post("/read")
    async def read(request: Request) -> int:
        return len(await read_body(request))

    scope = {"type": "http", "method": "POST", "path": "/read", "raw_path": b"/read", "query_string": b""}
    scope |= {"headers": [], "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 2)}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert 'route="/read",status="499"' in metrics.text()
    assert 'status="500"' not in metrics.text()
