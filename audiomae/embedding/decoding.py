"""Work items to windows: in this process, or in a child process for files that may take their process down.

A shard whose worker died is embedded again with `IsolatedDecoder`: every file is decoded by a child, so that a
segmentation fault, an out-of-memory kill or an endless loop in a C library costs the child, and after a few tries the
file is a failure row like any other. The child answers over a socket pair and ends when its parent does.
"""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from audiomae.artifacts.tables import DAMAGED, FAILED, EmbedSettings
from audiomae.config import StrictConfig
from audiomae.corpus.decode import DecodeLimits, DecodeReport, iter_windows
from audiomae.corpus.manifest import open_source
from audiomae.embedding.pieces import PIECES, Clip, Damage, Piece, Silent
from audiomae.embedding.silence import hush
from audiomae.errors import DecodeError, ItemError
from audiomae.retries import retry

MEMORY_LIMIT_BYTES = 8 << 30
TRIES = 3
BACKOFF_S = 1.0
READ_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


Item = dict[str, Any]
Decode = Callable[[Item], Iterator[Piece]]


def decode_item(item: Item, root: str, settings: EmbedSettings) -> Iterator[Piece]:
    """The windows of a work item, and what is silent or damaged in it, decoded in this process.

    Raises:
        ItemError: for everything that can be wrong with a file or with reading it.
    """
    start, end = item.get("segment_start_s") or 0.0, item.get("segment_end_s")
    end = None if end is None or math.isinf(end) else end
    try:
        source = open_source(root, item["uri"], item.get("tar_offset"), item.get("size"))
        limits, report = DecodeLimits(on_damage=settings.on_damage, channel=settings.channel), DecodeReport()
        windows = iter_windows(
            source,
            settings.sample_rate,
            settings.window_s,
            settings.hop_s,
            start,
            end,
            limits,
            settings.last_window,
            report,
        )
        clips = (Clip(window.start_s, window.end_s, window.samples, note=window.note) for window in windows)
        yield from hush(clips, settings) if settings.silence == "skip" else clips
        for span in report.within(start, end):
            yield Damage(span.start_s, span.end_s, span.stage, span.error_class, span.message)
    except DecodeError as error:
        raise ItemError(error.stage, error.error_class, error.message, error.error_class == "ReadFailed") from error
    except READ_ERRORS as error:
        raise ItemError("read", type(error).__name__, str(error)) from error
    except MemoryError as error:
        raise ItemError("decode", "MemoryError", f"not enough memory to decode it: {error}") from error
    except Exception as error:  # storage clients raise what they like: a lost connection, a 503
        raise ItemError("read", type(error).__name__, str(error), passing=True) from error


def consume_item(item: Item, decode: Decode, accept: Callable[[Piece], None], reset: Callable[[], None]) -> Item | None:
    """Pass the pieces of one item to `accept`; `None`, or a failure row after `reset` has undone what was accepted.

    An item without a window to embed is a failure; its silent windows stay accepted.

    What may pass (a lost connection, a 503, a decoder process that died) is tried again with backoff.
    """
    tries = 0

    def once() -> Item | None:
        nonlocal tries
        tries += 1
        count: Counter[type] = Counter()
        try:
            for piece in decode(item):
                count[type(piece)] += 1
                accept(piece)
        except ItemError:
            reset()
            raise
        quiet_segment = count[Silent] and item.get("segment_start_s") is not None
        if count[Clip] or quiet_segment:  # the rest of a long recording may well be heard
            return None
        return _nothing_to_embed(item, count[Silent], count[Damage])

    try:
        return retry(once, lambda error: isinstance(error, ItemError) and error.passing, TRIES, BACKOFF_S)
    except ItemError as error:
        tried = f" (tried {tries} times)" if tries > 1 else ""
        return failure_row(item, error.stage, error.error_class, error.message + tried)


def _nothing_to_embed(item: Item, silent: int, damaged: int) -> Item:
    if silent:
        lost = f", {damaged} spans are damaged" if damaged else ""
        return failure_row(
            item, "decode", "SilentAudio", f"nothing can be heard in its {silent} windows{lost}; see silent/"
        )
    if damaged:
        return failure_row(item, "decode", "CorruptAudio", f"all of it is damaged ({damaged} spans)")
    return failure_row(item, "decode", "EmptyAudio", "no samples in the file or segment")


def failure_row(
    item: Item,
    stage: str,
    error_class: str,
    message: str,
    kind: str = FAILED,
    span: tuple[float, float | None] | None = None,
) -> Item:
    """A row of `failures/`; the span is by default that of the segment, open-ended for a whole file."""
    start, end = span or (item.get("segment_start_s") or 0.0, item.get("segment_end_s"))
    return {
        "uri": item["uri"],
        "start_s": start,
        "end_s": end if end is not None and math.isfinite(end) else None,
        "stage": stage,
        "error_class": error_class,
        "message": message[:2000],
        "kind": kind,
    }


def damage_row(item: Item, damage: Damage) -> Item:
    """A row of `failures/` for a lost span of an item that was embedded."""
    span = damage.start_s, damage.end_s
    return failure_row(item, damage.stage, damage.error_class, damage.message, DAMAGED, span)


def silent_row(item: Item, silent: Silent) -> Item:
    """A row of `silent/`."""
    return {"uri": item["uri"], **silent._asdict()}


class IsolatedDecoder:
    """`decode_item` in a child process, started when first needed and again after each death.

    Raises (while iterating):
        ItemError: what the child raised; `ProcessDied` (may pass) with its signal or exit status when it died;
            `Stalled` when no window came for `stall_timeout_s`.
    """

    def __init__(self, root: str, settings: EmbedSettings, stall_timeout_s: float) -> None:
        self.root, self.settings, self.stall_timeout_s = root, settings, stall_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, item: Item) -> Iterator[Piece]:
        pipe = self._start()
        try:
            pipe.send((item, self.root, self.settings.model_dump()))
            while True:
                if not pipe.poll(self.stall_timeout_s):
                    self.close()
                    raise ItemError("decode", "Stalled", f"no window within {self.stall_timeout_s:g} s")
                kind, value = pipe.recv()
                if kind == "end":
                    return
                if kind == "error":
                    raise ItemError(*value)
                yield PIECES[kind](*value)
        except (EOFError, OSError) as error:
            raise ItemError("decode", "ProcessDied", f"its decoder process {self.close()}", passing=True) from error
        except GeneratorExit:  # the caller stopped half-way: the rest is still in the pipe
            self.close()
            raise

    def close(self) -> str:
        """Stop the child; say how it ended."""
        if self._child is None or self._pipe is None:
            return "was not running"
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=0.5)
        self._child.kill()
        status = self._child.wait()
        self._child = self._pipe = None
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    def _start(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-m", "audiomae.embedding.decoding", str(theirs.fileno())]
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            theirs.close()
        return self._pipe


class EmbedJob(StrictConfig):
    """All a worker needs to know; it travels with every stage."""

    out: str
    encoder: str
    root: str
    settings: EmbedSettings
    manifest: str
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    compiled: bool = False
    threads: int = 1
    isolate: bool = False
    stall_timeout_s: float = 600.0


def decoder_of(job: EmbedJob) -> Decode:
    """How this job decodes an item: here, guarded by a watchdog, or in a child process."""
    if job.isolate:
        return IsolatedDecoder(job.root, job.settings, job.stall_timeout_s)
    return partial(_watched, job)


def _watched(job: EmbedJob, item: Item) -> Iterator[Piece]:
    """Decode here; a decoder stuck in a C library ends this process, so that the shard is retried in isolation.

    The kernel's alarm does it: its default is to end the process, and setting it costs a microsecond.
    """
    others = signal.setitimer(signal.ITIMER_REAL, job.stall_timeout_s)
    try:
        for piece in decode_item(item, job.root, job.settings):
            signal.setitimer(signal.ITIMER_REAL, *others)
            yield piece
            signal.setitimer(signal.ITIMER_REAL, job.stall_timeout_s)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)


def decode_on_request(pipe: Connection) -> None:
    """The child's loop: items in; pieces by the name of their type, then `end` or `error`, out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item, root, settings = pipe.recv()
            try:
                for piece in decode_item(item, root, EmbedSettings(**settings)):
                    pipe.send((type(piece).__name__, tuple(piece)))
                pipe.send(("end", None))
            except ItemError as error:
                pipe.send(("error", error.args))


if __name__ == "__main__":
    decode_on_request(Connection(int(sys.argv[1])))
