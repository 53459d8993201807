"""A JSON line for each request, written a few times a second: one by one they took a tenth of a search by vector."""

import asyncio
import atexit
import logging
import logging.handlers
from pathlib import Path
from typing import Any

import orjson

SERVE = "ray.serve"  # Ray gives this logger a file for each replica
FLUSH_S = 0.25


class RequestLog:
    """Lines of one replica. What it has in hand when the process is killed, a quarter of a second's, is lost.

    Args:
        handler: where they go.
    """

    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler
        self._lines: list[bytes] = []
        atexit.register(self.flush)

    @classmethod
    def of_replica(cls) -> "RequestLog":
        """In `requests_<replica>.log` beside the replica's own log, turned over like it; stderr without one."""
        for handler in logging.getLogger(SERVE).handlers:
            file = getattr(handler, "target", handler)
            if isinstance(file, logging.handlers.RotatingFileHandler):
                path = Path(file.baseFilename)
                name = f"requests_{path.name.removeprefix('replica_')}"
                beside = logging.handlers.RotatingFileHandler(
                    path.with_name(name), maxBytes=file.maxBytes, backupCount=file.backupCount, delay=True
                )
                return cls(beside)
        return cls(logging.StreamHandler())

    def note(self, line: dict[str, Any]) -> None:
        """Write a line, soon; on the event loop."""
        self._lines.append(orjson.dumps(line))
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what there is."""
        lines, self._lines = self._lines, []
        if lines:
            self._handler.handle(logging.makeLogRecord({"msg": b"\n".join(lines).decode()}))
