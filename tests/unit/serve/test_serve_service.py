"""What the service does when a deployment is slow, dead, full or of another release."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from audiomae.errors import IntegrityError
from serve import service as module
from serve.problems import Problem
from serve.records import EncoderInfo, IndexInfo, Ranked
from serve.schema import ServeArgs
from serve.service import SearchService

ENCODER = EncoderInfo(
    fingerprint="f", sample_rate=16_000, window_s=2.0, dim=2, device="cpu", text_reason="deaf to words"
)
INDEX = IndexInfo(version="v1", fingerprint="f", rows=1, dim=2, columns=("id", "label"), window_s=None)
HIT = Ranked({"id": 7}, 0.5, 0)


class Method:
    """A deployment's method: gives the prepared results one after the other, the last one for ever."""

    def __init__(self, *results: Any) -> None:
        self.results, self.calls = list(results), 0

    def remote(self, *_: Any) -> Awaitable[Any]:
        async def call() -> Any:
            result = self.results[min(self.calls, len(self.results) - 1)]
            self.calls += 1
            if isinstance(result, BaseException):
                raise result
            return await result() if callable(result) else result

        return call()


class Handle:
    """A deployment handle with the methods it is given."""

    def __init__(self, **methods: Method) -> None:
        self.__dict__.update(methods)


class Shared:
    """The version that all replicas agreed on."""

    version = "v1"

    def get(self) -> str:
        return self.version


async def never() -> None:
    await asyncio.Event().wait()


def serving(encoder: Handle | None = None, index: Handle | None = None, **args: Any) -> SearchService:
    shared: Any = Shared()
    handles: Any = encoder or Handle(load=Method(ENCODER)), index or Handle(load=Method(INDEX))
    return SearchService(ServeArgs(index="unused", **args), *handles, shared)


def problem_of(call: Callable[[], Awaitable[Any]]) -> Problem:
    async def run() -> Any:
        return await call()

    with pytest.raises(Problem) as caught:
        asyncio.run(run())
    return caught.value


def test_a_request_survives_the_death_of_two_replicas() -> None:
    search = Method(ActorDiedError(), ActorUnavailableError("gone", None), [[HIT]])
    service = serving(index=Handle(load=Method(INDEX), search=search))
    _, rankings, timing = asyncio.run(service.search_vectors([[1.0, 0.0]], 1, None))
    assert (rankings, search.calls) == ([[HIT]], 3)
    assert timing.search > 0


def test_a_third_death_is_said() -> None:
    service = serving(index=Handle(load=Method(INDEX), search=Method(ActorDiedError())))
    problem = problem_of(lambda: service.search_vectors([[1.0, 0.0]], 1, None))
    assert (problem.status_code, problem.code, problem.headers) == (503, "replica_lost", {"Retry-After": "1"})


def test_a_full_queue_is_an_answer() -> None:
    full = BackPressureError(num_queued_requests=9, max_queued_requests=8)
    service = serving(index=Handle(load=Method(INDEX), similar=Method(full)))
    problem = problem_of(lambda: service.search_similar(1, 1, None))
    assert (problem.status_code, problem.code) == (503, "overloaded")


def test_a_deployment_that_does_not_answer_is_not_waited_for() -> None:
    service = serving(index=Handle(load=Method(INDEX), item=Method(never)), request_timeout_s=0.01)
    problem = problem_of(lambda: service.item(1))
    assert (problem.status_code, problem.code) == (504, "timeout")


def test_it_is_not_ready_before_the_encoder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READY_S", 0.01)
    service = serving(encoder=Handle(load=Method(never)))
    problem = problem_of(service.check)
    assert (problem.status_code, problem.code) == (503, "not_ready")


def test_encoder_and_index_of_different_fingerprints_never_meet() -> None:
    service = serving(encoder=Handle(load=Method(replace(ENCODER, fingerprint="g"))))
    with pytest.raises(IntegrityError, match="g is not the index's f"):
        asyncio.run(service.search_vectors([[1.0, 0.0]], 1, None))


def test_a_version_chosen_elsewhere_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECHECK_S", -1.0)
    index = Handle(load=Method(INDEX), search=Method([[HIT]]))
    service = serving(index=index)

    async def ask_twice() -> list[str]:
        seen = []
        for version in ("v1", "v2"):
            service._shared.version = version  # type: ignore[attr-defined]
            seen.append((await service.search_vectors([[0.0, 2.0]], 1, None))[0].version)
        return seen

    assert asyncio.run(ask_twice()) == ["v1", "v2"]


def test_words_are_refused_with_the_encoders_reason() -> None:
    problem = problem_of(lambda: serving().search_text("rain", 1, None))
    assert (problem.status_code, problem.code) == (501, "no_text_tower")
    assert "deaf to words" in problem.detail


def test_queries_are_windows_of_the_corpus_length() -> None:
    encoded: list[int] = []

    class Encode(Method):
        def remote(self, *args: Any) -> Awaitable[Any]:
            encoded.extend(len(window) for window in args[1])
            return Method(np.eye(2, dtype=np.float32)[: len(args[1])]).remote()

    data = wav_of_silence(seconds=2.0)
    for window_s, lengths in ((1.0, [16_000, 16_000]), (None, [32_000])):
        encoded.clear()
        index = Handle(load=Method(replace(INDEX, window_s=window_s)), search=Method([[HIT]]))
        service = serving(encoder=Handle(load=Method(ENCODER), encode=Encode()), index=index)
        asyncio.run(service.search_audio(data, 1, None, by_window=False))
        assert encoded == lengths


def wav_of_silence(seconds: float) -> bytes:

    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(seconds * 16_000)), 16_000, format="WAV")
    return file.getvalue()
