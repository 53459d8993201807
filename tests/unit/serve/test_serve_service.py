"""What the service does when the encoder is slow, dead, full or of another release, and what it makes of a query."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import soundfile
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from audiomae.errors import IntegrityError
from serve import serving as module
from serve.arguments import ServeArgs
from serve.problems import Problem
from serve.queries import Answer, EncoderInfo, Mixed, Region, Sound, Wanted
from serve.service import SearchService

ENCODER = EncoderInfo(
    fingerprint="f", sample_rate=16_000, window_s=2.0, dim=2, device="cpu", text_reason="deaf to words"
)
ROWS = {
    1: {"id": 1, "uri": "a", "start_s": 0.0, "end_s": 2.0, "label": "x"},
    2: {"id": 2, "uri": "a", "start_s": 2.0, "end_s": 4.0, "label": "x"},
    3: {"id": 3, "uri": "b", "start_s": 0.0, "end_s": 2.0, "label": "y"},
}
VECTORS = {1: [1.0, 0.0], 2: [0.8, 0.6], 3: [0.0, 1.0]}


class Catalogue:
    """Three windows of two files, searched by comparing them all."""

    def __init__(self, version: str = "v1", fingerprint: str = "f", window_s: float | None = None) -> None:
        self.version, self.fingerprint, self.window_s = version, fingerprint, window_s
        self.rows, self.dim, self.columns = 3, 2, ("id", "uri", "label")
        self.index = SimpleNamespace(vector=lambda clip: np.array(VECTORS[clip]), spec=SimpleNamespace(kind="flat"))
        self.calibration = None
        self.written: dict[int, tuple[bytes, bytes]] = {}
        self.asked: list[np.ndarray] = []

    def item(self, clip: int) -> dict[str, Any] | None:
        return ROWS.get(clip)

    def search(self, queries: np.ndarray, k: int, filter: Any, by_file: bool) -> Any:
        self.asked.append(queries)
        ids = list(ROWS)
        scores = queries @ np.array([VECTORS[clip] for clip in ids]).T
        order = np.argsort(-scores, axis=1)[:, :k]
        return SimpleNamespace(
            scores=np.take_along_axis(scores, order, axis=1),
            rows=order,
            rows_of=lambda rows: [dict(ROWS[ids[row]]) for row in rows],
            windows=None,
            missing=(),
        )


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


class Shared:
    """The version that all replicas agreed on."""

    version = "v1"

    def get(self) -> str:
        return self.version


async def never() -> None:
    await asyncio.Event().wait()


def serving(catalogue: Catalogue | None = None, args: dict[str, Any] | None = None, **methods: Method) -> SearchService:
    """A service that encodes elsewhere, by these methods."""
    shared: Any = Shared()
    handle: Any = SimpleNamespace(**{"load": Method(ENCODER), **methods})
    service = SearchService(ServeArgs(index="unused", **(args or {})), handle, shared, local=False)
    service.release._catalogues._opener = lambda version: catalogue or Catalogue(version)  # type: ignore[assignment, return-value]
    return service


def ranking(answer: Answer) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = orjson.loads(orjson.dumps(answer.results[0]))
    return hits


def problem_of(call: Callable[[], Awaitable[Any]]) -> Problem:
    async def run() -> Any:
        return await call()

    with pytest.raises(Problem) as caught:
        asyncio.run(run())
    return caught.value


def wav(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(seconds * 16_000)), 16_000, format="WAV")
    return file.getvalue()


UP = np.array([[0.0, 1.0]], np.float32)


def test_a_request_survives_the_death_of_two_replicas() -> None:
    encode = Method(ActorDiedError(), ActorUnavailableError("gone", None), UP)
    answer = asyncio.run(serving(encode=encode).search_sound(Sound(wav(1)), Wanted(k=1, group="none")))
    assert ([hit["id"] for hit in ranking(answer)], encode.calls, answer.release) == ([3], 3, "v1")
    assert answer.timing.decode > 0 and answer.timing.encode > 0 and answer.timing.search > 0


def test_a_third_death_is_said() -> None:
    service = serving(encode=Method(ActorDiedError()))
    problem = problem_of(lambda: service.search_sound(Sound(wav(1)), Wanted()))
    assert (problem.status_code, problem.code, problem.headers) == (503, "replica_lost", {"Retry-After": "1"})


def test_a_full_queue_is_an_answer() -> None:
    full = BackPressureError(num_queued_requests=9, max_queued_requests=8)
    problem = problem_of(lambda: serving(encode=Method(full)).search_sound(Sound(wav(1)), Wanted()))
    assert (problem.status_code, problem.code) == (503, "overloaded")


def test_an_encoder_that_does_not_answer_is_not_waited_for() -> None:
    service = serving(args={"request_timeout_s": 0.1}, encode=Method(never))
    problem = problem_of(lambda: service.search_sound(Sound(wav(1)), Wanted()))
    assert (problem.status_code, problem.code) == (504, "timeout")


def test_it_is_not_ready_before_the_encoder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READY_S", 0.05)
    problem = problem_of(serving(load=Method(never)).release.check)
    assert (problem.status_code, problem.code) == (503, "not_ready")


def test_encoder_and_index_of_different_fingerprints_never_meet() -> None:
    service = serving(load=Method(replace(ENCODER, fingerprint="g")))
    with pytest.raises(IntegrityError, match="g is not the index's f"):
        asyncio.run(service.search_vectors([[1.0, 0.0]], Wanted()))


def test_a_version_chosen_elsewhere_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECHECK_S", -1.0)
    service = serving()

    async def ask_twice() -> list[str]:
        seen = []
        for version in ("v1", "v2"):
            service.release._shared.version = version  # type: ignore[attr-defined]
            seen.append((await service.search_vectors([[0.0, 2.0]], Wanted())).release)
        return seen

    assert asyncio.run(ask_twice()) == ["v1", "v2"]


def test_words_are_refused_with_the_encoders_reason() -> None:
    problem = problem_of(lambda: serving().search_mixed(Mixed(text="rain"), Wanted()))
    assert (problem.status_code, problem.code) == (501, "no_text_tower")
    assert "deaf to words" in problem.detail


@pytest.mark.parametrize(("window_s", "lengths"), [(1.0, [16_000, 16_000]), (None, [32_000])])
def test_queries_are_windows_of_the_corpus_length(window_s: float | None, lengths: list[int]) -> None:
    encoded: list[int] = []

    class Encode(Method):
        def remote(self, *args: Any) -> Awaitable[Any]:
            encoded.extend(len(window) for window in args[1])
            return Method(np.eye(2, dtype=np.float32)[: len(args[1])]).remote()

    service = serving(Catalogue(window_s=window_s), encode=Encode())
    asyncio.run(service.search_sound(Sound(wav(2)), Wanted(k=1)))
    assert encoded == lengths


def test_a_long_upload_goes_to_the_encoder_as_it_is() -> None:
    sent: list[Any] = []

    class Upload(Method):
        def remote(self, *args: Any) -> Awaitable[Any]:
            sent.append(args)
            return Method(([(0.0, 2.0)], UP)).remote()

    service = serving(args={"short_audio_s": 4.0}, embed_upload=Upload())
    data, region = wav(9), Region(1.0)
    answer = asyncio.run(service.search_sound(Sound(data, region=region), Wanted(k=1, group="none")))
    assert [hit["id"] for hit in ranking(answer)] == [3]
    assert sent == [("v1", data, 2.0, region)]


def test_examples_pull_and_push_and_are_no_hits() -> None:
    catalogue = Catalogue()
    mix = Mixed([Sound(clip=1), np.array([0.0, 2.0])], [Sound(clip=3)])
    answer = asyncio.run(serving(catalogue).search_mixed(mix, Wanted(k=3, group="none")))
    np.testing.assert_allclose(catalogue.asked[0], [[1.0, 0.0]], atol=1e-6)  # (x + y) / 2 - y / 2
    assert [hit["id"] for hit in ranking(answer)] == [2]


def test_more_like_this_leaves_out_the_item_or_with_files_as_hits_its_file() -> None:
    for group, found in (("none", [2, 3]), ("file", [3])):
        answer = asyncio.run(serving().search_similar(1, Wanted(k=3, group=group)))  # type: ignore[arg-type]
        assert [hit["id"] for hit in ranking(answer)] == found
    problem = problem_of(lambda: serving().search_similar(9, Wanted()))
    assert (problem.status_code, problem.code) == (404, "unknown_id")


def test_an_answer_has_no_more_hits_than_allowed() -> None:
    service = serving(args={"max_hits": 10})
    problem = problem_of(lambda: service.search_vectors([[1.0, 0.0]] * 3, Wanted(k=4)))
    assert (problem.status_code, problem.code) == (422, "too_many_hits")


def test_a_reload_while_a_replica_is_replaced_asks_to_try_again() -> None:
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import DeploymentUnavailableError

    from serve.failures import refusal

    problem = refusal(DeploymentUnavailableError(DeploymentID(name="Encoder", app_name="search")))
    assert isinstance(problem, Problem) and (problem.status_code, problem.code) == (503, "replica_lost")
    assert problem.headers == {"Retry-After": "1"}
