"""What a request does, without HTTP: decode, encode, search, in that order, by way of two deployment handles."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from audiomae.corpus.decode import Window
from audiomae.errors import FilterError, IntegrityError, UserError
from serve import audio
from serve.problems import Problem
from serve.records import EncoderInfo, IndexInfo, Ranked
from serve.schema import ServeArgs, Timing, check_filter
from serve.versions import SharedVersion

T = TypeVar("T")
ATTEMPTS = 3
RECHECK_S = 1.0
READY_S = 5.0
RELOAD_S = 900.0


@dataclass(frozen=True)
class Serving:
    """The release that a request is answered from, first to last."""

    version: str
    encoder: EncoderInfo
    index: IndexInfo

    @property
    def window_s(self) -> float:
        """Seconds of a query window: that of the indexed corpus, so that like is compared with like."""
        return self.index.window_s or self.encoder.window_s


class SearchService:
    """Answers queries from the serving release and swaps releases under load.

    Args:
        args: the service's arguments.
        encoder: handle of `serve.encoder.Encoder`.
        index: handle of `serve.index.Index`.
        shared: the version that all replicas have agreed on.
    """

    def __init__(
        self, args: ServeArgs, encoder: DeploymentHandle, index: DeploymentHandle, shared: SharedVersion
    ) -> None:
        self.args, self._encoder, self._index, self._shared = args, encoder, index, shared
        self._decoders = ThreadPoolExecutor(args.decode_threads, thread_name_prefix="decode")
        self._serving: Serving | None = None
        self._checked_at = 0.0
        self._switching = asyncio.Lock()

    async def serving(self) -> Serving:
        """The release to answer from. The shared choice is looked at again when the last look is over a second old."""
        now = time.monotonic()
        if self._serving is None or now - self._checked_at > RECHECK_S:
            version = await asyncio.to_thread(self._shared.get)
            self._checked_at = now
            if self._serving is None or self._serving.version != version:
                async with self._switching:
                    if self._serving is None or self._serving.version != version:
                        self._serving = await self._describe(version)
        return self._serving

    async def check(self) -> Serving:
        """The serving release, after a replica of each deployment has answered for it.

        Raises:
            Problem: 503 `not_ready` when one has not within five seconds.
        """
        try:
            async with asyncio.timeout(READY_S):
                serving = await self.serving()
                await self._describe(serving.version)
                return serving
        except TimeoutError:
            raise Problem(503, "not_ready", f"encoder or index gave no sign within {READY_S:g} s") from None

    async def search_audio(
        self, data: bytes, k: int, filter: str | None, by_window: bool
    ) -> tuple[Serving, list[Ranked], list[Window], Timing]:
        """Hits for an upload: of the whole clip, or (`by_window`) the best match of each item to any of its windows."""
        serving = await self.serving()
        checked = self._checked(serving, k, filter)
        timing = Timing()
        windows, vectors = await self._embed(serving, data, timing)
        queries = vectors if by_window else audio.clip_vector(vectors)[None]
        rankings = await self._timed(timing, "search", self._search(serving, queries, k, checked))
        return serving, merge_rankings(rankings)[:k], windows, timing

    async def search_vectors(
        self, vectors: Sequence[Sequence[float]], k: int, filter: dict[str, Any] | None
    ) -> tuple[Serving, list[list[Ranked]], Timing]:
        """Hits for each of the given vectors, which are scaled to unit length first."""
        serving = await self.serving()
        checked = self._checked(serving, k, filter)
        queries = check_vectors(vectors, serving.index.dim, self.args.max_vectors)
        timing = Timing()
        rankings = await self._timed(timing, "search", self._search(serving, queries, k, checked))
        return serving, rankings, timing

    async def search_text(
        self, text: str, k: int, filter: dict[str, Any] | None
    ) -> tuple[Serving, list[Ranked], Timing]:
        """Hits for a description in words, where the encoder has a text tower."""
        serving = await self.serving()
        if serving.encoder.text_reason is not None:
            detail = f"release {serving.version} cannot be searched by text: {serving.encoder.text_reason}"
            raise Problem(501, "no_text_tower", detail)
        checked = self._checked(serving, k, filter)
        timing = Timing()
        encoding = self._call(self._encoder.encode_text, serving.version, [text])
        vectors = await self._timed(timing, "encode", encoding)
        rankings = await self._timed(timing, "search", self._search(serving, vectors, k, checked))
        return serving, rankings[0], timing

    async def search_similar(self, clip: int, k: int, filter: str | None) -> tuple[Serving, list[Ranked], Timing]:
        """Hits for an item of the index, itself excluded."""
        serving = await self.serving()
        checked = self._checked(serving, k, filter)
        timing = Timing()
        call = self._call(self._index.similar, serving.version, clip, k, checked)
        ranked = await self._timed(timing, "search", call)
        if ranked is None:
            raise unknown_id(clip, serving)
        return serving, ranked, timing

    async def embed(self, data: bytes) -> tuple[Serving, np.ndarray, list[Window], Timing]:
        """Unit vectors float32[W, dim] of an upload's windows."""
        serving = await self.serving()
        timing = Timing()
        windows, vectors = await self._embed(serving, data, timing)
        return serving, vectors, windows, timing

    async def item(self, clip: int) -> tuple[Serving, dict[str, Any], str]:
        """The row of item `clip` and the root of the corpus that its `uri` is relative to."""
        serving = await self.serving()
        found = await self._call(self._index.item, serving.version, clip)
        if found is None:
            raise unknown_id(clip, serving)
        return serving, *found

    async def in_decode_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run blocking work on an upload or an item off the event loop, at most `decode_threads` at a time."""
        work = asyncio.get_running_loop().run_in_executor(self._decoders, function, *args)
        return await self._bounded(work, self.args.max_decode_s + self.args.request_timeout_s, "decoding")

    async def reload(self, version: str) -> Serving:
        """Swap to release `version` once every replica has opened and checked it; the old one serves until then.

        Raises:
            Problem: 404 `unknown_release` or 409 `release_refused`; what was being served goes on being served.
        """
        try:
            concrete = await self._call(self._index.resolve, version)
            indexes, encoders = await asyncio.gather(
                self._index.broadcast("load", concrete).results_async(timeout_s=RELOAD_S),
                self._encoder.broadcast("load", concrete).results_async(timeout_s=RELOAD_S),
            )
            serving = joined(concrete, encoders[0], indexes[0])
        except TimeoutError as error:
            raise Problem(504, "timeout", f"not every replica opened the release within {RELOAD_S:g} s") from error
        except UserError as error:
            raise Problem(404, "unknown_release", reason(error)) from error
        except IntegrityError as error:
            raise Problem(409, "release_refused", reason(error)) from error
        await asyncio.to_thread(self._shared.set, concrete)
        async with self._switching:
            self._serving = serving
        return serving

    async def _describe(self, version: str) -> Serving:
        index, encoder = await asyncio.gather(
            self._call(self._index.load, version), self._call(self._encoder.load, version)
        )
        return joined(version, encoder, index)

    def _checked(self, serving: Serving, k: int, filter: str | dict[str, Any] | None) -> dict[str, Any] | None:
        if not 1 <= k <= self.args.max_k:
            raise Problem(422, "bad_k", f"k is {k}; expected 1 to {self.args.max_k}")
        return check_filter(filter, serving.index.columns)

    async def _embed(self, serving: Serving, data: bytes, timing: Timing) -> tuple[list[Window], np.ndarray]:
        rate, window_s = serving.encoder.sample_rate, serving.window_s
        decoding = self.in_decode_thread(audio.decode_query, data, rate, window_s, self.args)
        windows = await self._timed(timing, "decode", decoding)
        samples = [window.samples for window in windows]
        encoding = self._call(self._encoder.encode, serving.version, samples)
        return windows, await self._timed(timing, "encode", encoding)

    async def _search(
        self, serving: Serving, queries: np.ndarray, k: int, filter: dict[str, Any] | None
    ) -> list[list[Ranked]]:
        return await self._call(self._index.search, serving.version, queries, k, filter)

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call a deployment; a replica that died under the call is replaced by another one, twice."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._bounded(method.remote(*args), self.args.request_timeout_s, "the model or the index")
            except FilterError as error:
                raise Problem(422, "bad_filter", reason(error)) from error
            except (ActorDiedError, ActorUnavailableError) as error:
                if attempt == ATTEMPTS:
                    raise try_again("replica_lost", error) from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise try_again("overloaded", error) from error

    async def _bounded(self, work: Awaitable[T], seconds: float, what: str) -> T:
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise Problem(504, "timeout", f"no answer from {what} within {seconds:g} s") from None

    async def _timed(self, timing: Timing, part: str, work: Awaitable[T]) -> T:
        started = time.perf_counter()
        try:
            return await work
        finally:
            setattr(timing, part, round((time.perf_counter() - started) * 1000, 3))


def joined(version: str, encoder: EncoderInfo, index: IndexInfo) -> Serving:
    """Encoder and index of one release; they never meet when their fingerprints differ."""
    if encoder.fingerprint != index.fingerprint:
        raise IntegrityError(
            f"release {version}: encoder fingerprint {encoder.fingerprint} is not the index's {index.fingerprint}"
        )
    return Serving(version, encoder, index)


def check_vectors(vectors: Sequence[Sequence[float]], dim: int, limit: int) -> np.ndarray:
    """Query vectors as unit float32[Q, dim]; 422 when they are too many, of another length, or zero."""
    if len(vectors) > limit:
        raise Problem(422, "too_many_vectors", f"{len(vectors)} vectors; at most {limit} in one call")
    for row, vector in enumerate(vectors):
        if len(vector) != dim:
            detail = f"vectors[{row}] has {len(vector)} numbers; this index needs {dim}"
            raise Problem(422, "vector_dim_mismatch", detail, expected=dim, got=len(vector))
    queries = np.asarray(vectors, np.float64)
    peaks = np.abs(queries).max(axis=1, keepdims=True)
    if not peaks.all():
        detail = f"vectors[{int(np.argmin(peaks[:, 0]))}] is all zeros and has no direction"
        raise Problem(422, "zero_vector", detail)
    queries /= peaks  # so that no square overflows or vanishes
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def merge_rankings(rankings: list[list[Ranked]]) -> list[Ranked]:
    """One ranking of several queries' hits: each item once, with its best score and the query that gave it."""
    best: dict[int, Ranked] = {}
    for hit in (hit for ranking in rankings for hit in ranking):
        if hit.row["id"] not in best or hit.score > best[hit.row["id"]].score:
            best[hit.row["id"]] = hit
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.row["id"]))


def try_again(code: str, error: BaseException) -> Problem:
    """503 for what passes by itself."""
    return Problem(503, code, f"{reason(error)}; try again", headers={"Retry-After": "1"})


def reason(error: BaseException) -> str:
    """The message of an error, without the remote traceback that Ray adds to one from another process."""
    return str(getattr(error, "cause", None) or error)


def unknown_id(clip: int, serving: Serving) -> Problem:
    """404 for an id that the serving release does not hold."""
    return Problem(404, "unknown_id", f"no item {clip} in release {serving.version}")
