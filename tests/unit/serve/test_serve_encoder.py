"""Windows of many requests go through the encoder together, and none waits for a long request to end."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
import soundfile
import torch
from threadpoolctl import threadpool_info

from serve import encoder as serve_encoder
from serve.arguments import ServeArgs
from serve.encoder import BEHIND, LAST, LONG_BATCH, BatchingEncoder, Encoder
from serve.queries import WHOLE
from serve.teamwork import Teamwork


class Recorder:
    """An encoder that gives each window's first sample back, holds its first batch, and notes every batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go = threading.Event(), threading.Event()

    def embed(self, windows: list[np.ndarray], batch_size: int) -> np.ndarray:
        assert batch_size == len(windows)
        self.batches.append([int(window[0]) for window in windows])
        self.started.set()
        assert self.go.wait(60)
        if any(window[0] < 0 for window in windows):
            raise ValueError("a window that cannot be encoded")
        return np.stack([window[:1] for window in windows])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[BatchingEncoder, Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(BatchingEncoder, "_open", lambda self, version: recorder)
    return BatchingEncoder(ServeArgs(index="unused", max_batch_size=6, encoder_threads=1)), recorder


def windows(*values: int) -> list[np.ndarray]:
    return [np.array([value, 0.0], np.float32) for value in values]


def test_the_windows_of_a_request_are_one_batch(made: tuple[BatchingEncoder, Recorder]) -> None:
    encoder, recorder = made
    recorder.go.set()
    assert encoder.encode("v1", windows(1, 2, 3), 60).tolist() == [[1], [2], [3]]
    assert recorder.batches == [[1, 2, 3]]


def test_requests_that_come_meanwhile_share_a_batch_and_a_long_one_takes_turns(
    made: tuple[BatchingEncoder, Recorder],
) -> None:
    encoder, recorder = made
    first = encoder.submit("v1", windows(0))
    assert recorder.started.wait(60)
    long = encoder.submit("v1", windows(*range(10, 10 + 2 * LONG_BATCH)))
    short = [encoder.submit("v1", windows(value, value + 1)) for value in (30, 40)]
    recorder.go.set()
    found = [np.concatenate([done.result(60) for done in futures])[:, 0].tolist() for futures in (first, long, *short)]
    assert found == [[0], list(range(10, 18)), [30, 31], [40, 41]]
    assert recorder.batches == [[0], [10, 11, 12, 13, 30, 31], [40, 41, 14, 15, 16, 17]]


def test_an_error_concerns_its_batch_and_who_gave_up_is_left_out(made: tuple[BatchingEncoder, Recorder]) -> None:
    encoder, recorder = made
    first: list[Any] = encoder.submit("v1", windows(0))
    assert recorder.started.wait(60)
    (gone,) = encoder.submit("v1", windows(5))
    (bad,) = encoder.submit("v2", windows(-1))
    (good,) = encoder.submit("v1", windows(7))
    assert gone.cancel()
    recorder.go.set()
    assert good.result(60).tolist() == [[7]] and first[0].result(60).tolist() == [[0]]
    with pytest.raises(ValueError, match="cannot be encoded"):
        bad.result(60)
    assert all(5 not in batch for batch in recorder.batches)


def test_batches_are_encoded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Semaphore(0), threading.Event()

    class Slow:
        """An encoder that says when a batch has begun and ends none before it is told to."""

        def embed(self, windows: list[np.ndarray], batch_size: int) -> np.ndarray:
            begun.release()
            assert go.wait(60)
            return np.stack([window[:1] for window in windows])

    monkeypatch.setattr(BatchingEncoder, "_open", lambda self, version: Slow())
    encoder = BatchingEncoder(ServeArgs(index="unused", encoder_threads=3))
    futures = []
    for number in range(3):
        futures += encoder.submit("v1", windows(number))
        assert begun.acquire(timeout=60), f"{number} batches are all that is encoded at a time"
    go.set()
    assert [done.result(60)[0, 0] for done in futures] == [0, 1, 2]


def test_the_leader_may_have_a_team_and_those_beside_it_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    leading, go = threading.Event(), threading.Event()

    class Counting:
        """An encoder that gives the threads that torch has for it; the leader's batch waits for `go`."""

        def embed(self, windows: list[np.ndarray], batch_size: int) -> np.ndarray:
            if windows[0][0] == 0:
                leading.set()
                assert go.wait(60)
            torch.ones(1 << 20).add_(1)  # work enough for several threads: now they are what they are
            (threads,) = {pool["num_threads"] for pool in threadpool_info() if "torch" in pool["filepath"]}
            return np.full((len(windows), 1), threads)

    monkeypatch.setattr(BatchingEncoder, "_open", lambda self, version: Counting())
    monkeypatch.setattr(Teamwork, "choose", lambda self: 2)
    encoder = BatchingEncoder(ServeArgs(index="unused", device="cpu", encoder_threads=2))
    led = encoder.leader.submit(encoder.encode_alone, "v1", windows(0), 60)
    assert leading.wait(60)
    beside = [encoder.encode("v1", windows(number), 60)[0, 0] for number in (1, 2, 3)]
    go.set()
    assert beside == [1, 1, 1] and led.result(60)[0, 0] == 2


@pytest.mark.parametrize(("cpus", "processes", "threads"), [(1, 1, 1), (2, 1, 2), (8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_a_batch_on_every_core_and_all_behind_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr("serve.encoder.available_cpus", lambda: cpus)
    before = set(threading.enumerate())
    BatchingEncoder(ServeArgs(index="unused", device="cpu"), processes)
    made = set(threading.enumerate()) - before
    assert len(made) == threads
    mine, until = os.getpriority(os.PRIO_PROCESS, 0), time.monotonic() + 60
    wanted = {min(19, mine + BEHIND)}
    while (nice := {os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) for thread in made}) != wanted:
        assert time.monotonic() < until, nice
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no such class")
def test_long_uploads_are_decoded_and_encoded_in_time_that_nobody_wants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    audio, seen = serving.make_encoder(), dict[str, tuple[int, int]]()
    embed, decode_query = audio.embed, serve_encoder.decode_query

    def note(what: str) -> None:
        seen[what] = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def encoded(*args: Any, **options: Any) -> np.ndarray:
        note("encoded")
        return embed(*args, **options)

    def decoded(*args: Any) -> Any:
        note("decoded")
        return decode_query(*args)

    monkeypatch.setattr(audio, "embed", encoded)
    monkeypatch.setattr(serve_encoder, "decode_query", decoded)
    monkeypatch.setattr(BatchingEncoder, "_open", lambda self, version: audio)
    soundfile.write(tmp_path / "long.wav", serving.sound("chirp", 0, 20.0), serving.RATE)
    mine = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    deployment = Encoder(ServeArgs(index="unused", device="cpu"), "v1")
    upload = deployment.embed_upload("v1", (tmp_path / "long.wav").read_bytes(), serving.WINDOW_S, WHOLE)
    spans, vectors = asyncio.run(upload)
    assert len(spans) == len(vectors) == 10
    assert seen == dict.fromkeys(("decoded", "encoded"), (os.SCHED_IDLE, LAST))
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == mine
