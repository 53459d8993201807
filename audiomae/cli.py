"""What every command of the product has in common: flags, exit codes, progress with rate and ETA."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from audiomae.errors import AudioMAEError, ConfigError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def job_parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser with `--config FILE` and `--set a.b=c` (both repeatable) and an example in its help."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML config; repeatable, later wins"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", dest="sets", help="override one config key; repeatable"
    )
    return parser


def run_job(main: Callable[[], int | None]) -> NoReturn:
    """Run a job's `main` and exit with 0 (done), 1 (failed) or 2 (bad usage or config)."""
    try:
        sys.exit(main() or EXIT_OK)
    except AudioMAEError as error:
        kind = "config error" if isinstance(error, ConfigError) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


class Progress:
    """A progress line on stderr with rate and ETA, printed at most every `every_s` seconds.

    Usable as a context manager; `close` prints the closing line.
    """

    def __init__(self, label: str, total: int | None, unit: str, every_s: float = 3.0) -> None:
        self.label, self.total, self.unit, self.every_s = label, total, unit, every_s
        self.done = 0
        self._started = self._printed = time.monotonic()

    def update(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if now - self._printed >= self.every_s:
            self._printed = now
            self._print(now, note)

    def close(self, note: str = "") -> None:
        """Print the final line."""
        self._print(time.monotonic(), note)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, now: float, note: str) -> None:
        elapsed = max(now - self._started, 1e-9)
        rate = self.done / elapsed
        text = f"{self.label}: {self.done:,}"
        if self.total:
            text += f"/{self.total:,}"
        text += f" {self.unit}, {rate:,.1f} {self.unit}/s"
        if self.total and rate > 0 and self.done < self.total:
            text += f", {_duration((self.total - self.done) / rate)} left"
        else:
            text += f", {_duration(elapsed)}"
        print(text + (f", {note}" if note else ""), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m{seconds:02d}s"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
