"""`serve run` for as long as a block lasts: for load by the benchmarks and for the tests."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from serve.proxy import free_ports

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 300  # of a busy machine


@contextmanager
def serve_run(index: Path | str, *more: str) -> Iterator[int]:
    """The port of a service started as a shell starts it, with a Ray of its own, once it is ready.

    Args:
        index: an INDEX.
        more: arguments of `serve.app:build`, as `name=value`.

    Raises:
        RuntimeError: it ended, or was not ready in time; with the end of what it said.
    """
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", "serve.app:build"]
    command += [f"index={index}", f"port={port}", *more]
    with tempfile.TemporaryFile() as log:
        service = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + PATIENCE_S
            while not _is_ready(port):
                if service.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"the service did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield port
        finally:
            if service.poll() is None:
                os.killpg(service.pid, signal.SIGTERM)
            try:
                service.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(service.pid, signal.SIGKILL)
                service.wait()


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False
