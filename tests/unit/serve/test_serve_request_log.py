"""A JSON line for each request, in a file of the replica that turns over, none lost when it ends."""

import asyncio
import logging
import logging.handlers
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from serve import request_log
from serve.request_log import RequestLog


@pytest.fixture
def replica_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the request log of a replica lies, whose own log is as Ray Serve makes it."""
    file = logging.handlers.RotatingFileHandler(tmp_path / "replica_app_Api_x.log", maxBytes=1000, backupCount=2)
    logger = logging.getLogger(request_log.SERVE)
    monkeypatch.setattr(logger, "handlers", [logging.handlers.MemoryHandler(1, target=file)])
    return tmp_path / "requests_app_Api_x.log"


def test_lines_come_soon_and_together(replica_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "FLUSH_S", 0.01)
    written: list[str] = []
    handle = logging.handlers.RotatingFileHandler.handle

    def noting(self: logging.handlers.RotatingFileHandler, record: logging.LogRecord) -> bool:
        written.append(record.getMessage())
        return handle(self, record)

    monkeypatch.setattr(logging.handlers.RotatingFileHandler, "handle", noting)

    async def scenario() -> None:
        log = RequestLog.of_replica()
        for path in ("/a", "/é\n", "/c"):
            log.note({"path": path})
        async with asyncio.timeout(60):
            while not written:
                await asyncio.sleep(0)

    asyncio.run(scenario())
    assert [orjson.loads(line)["path"] for line in replica_log.read_text().splitlines()] == ["/a", "/é\n", "/c"]
    assert len(written) == 1


def test_it_turns_over_as_the_replicas_own_log_does(replica_log: Path) -> None:
    async def scenario() -> None:
        log = RequestLog.of_replica()
        for _ in range(5):
            for number in range(20):
                log.note({"number": number, "pad": "x" * 20})
            log.flush()

    asyncio.run(scenario())
    assert sorted(path.name for path in replica_log.parent.glob("requests_*")) == [
        replica_log.name + end for end in ("", ".1", ".2")
    ]


def test_what_is_in_hand_at_the_end_is_written() -> None:
    code = """
import asyncio, logging
from serve.request_log import RequestLog
async def main():
    RequestLog(logging.StreamHandler()).note({"path": "/last"})
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert orjson.loads(done.stderr) == {"path": "/last"}


def test_without_a_file_it_goes_to_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging.getLogger(request_log.SERVE), "handlers", [])

    async def scenario() -> None:
        log = RequestLog.of_replica()
        log.note({"path": "/a"})
        log.flush()
        log.flush()

    asyncio.run(scenario())
    assert orjson.loads(capsys.readouterr().err) == {"path": "/a"}
