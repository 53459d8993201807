"""Metrics of several replicas as one Prometheus page; bodies that are never larger than allowed."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve import problems
from serve.metrics import ApiMetrics, CountRequests, merge
from serve.uploads import LimitBody


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


def application(metrics: ApiMetrics) -> FastAPI:
    app = FastAPI()
    app.add_middleware(LimitBody, max_bytes=1000)
    app.add_middleware(CountRequests, metrics=metrics)
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
    metrics = ApiMetrics("one")
    with TestClient(application(metrics), raise_server_exceptions=False) as client:
        reply = client.get("/fail")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert 'route="/fail",status="500"' in metrics.text()
