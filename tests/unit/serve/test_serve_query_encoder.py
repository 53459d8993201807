"""Requests that come one at a time go through the leader's thread; those that come together through the lane."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import as_file, sound

from serve import query_encoder as module
from serve.arguments import ServeArgs
from serve.lanes import Lanes
from serve.queries import EncoderInfo, Sound
from serve.query_encoder import QueryEncoder

SERVING: Any = SimpleNamespace(
    version="v1",
    window_s=2.0,
    encoder=EncoderInfo("f", 16_000, 2.0, 2, "cpu", None),
)


class Local:
    """Notes which thread encodes, in which way; waits for `go`."""

    def __init__(self, *_: Any) -> None:
        self.leader = ThreadPoolExecutor(1, "leader")
        self.ways: list[tuple[str, str]] = []
        self.go = threading.Event()

    def encode(self, version: str, windows: Any, timeout_s: float) -> np.ndarray:
        return self._noted("encode", windows)

    def encode_alone(self, version: str, windows: Any, timeout_s: float) -> np.ndarray:
        return self._noted("alone", windows)

    def _noted(self, way: str, windows: Any) -> np.ndarray:
        self.ways.append((way, threading.current_thread().name.partition("_")[0]))
        assert self.go.wait(60)
        return np.ones((len(windows), 2), np.float32)


def test_one_at_a_time_is_led_and_two_at_a_time_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    local = Local()
    monkeypatch.setattr(module, "BatchingEncoder", lambda args, processes: local)
    args = ServeArgs(index="unused")

    async def ask() -> None:
        encoder = QueryEncoder(args, SimpleNamespace(), Lanes(args), local=True)  # type: ignore[arg-type]
        upload = Sound(as_file(sound("tone", 0)))
        both = [asyncio.create_task(encoder.embed(SERVING, upload)) for _ in range(2)]
        while len(local.ways) < 2:
            await asyncio.sleep(0.001)
        local.go.set()
        await asyncio.gather(*both)
        await encoder.embed(SERVING, upload)  # a moment after the crowd
        encoder._crowded_at -= module.CALM_S
        await encoder.embed(SERVING, upload)
        await encoder.embed(SERVING, upload)

    asyncio.run(ask())
    assert sorted(local.ways[:2]) == [("alone", "leader"), ("encode", "short")]
    assert local.ways[2:] == [("encode", "short"), ("alone", "leader"), ("alone", "leader")]
