"""What a request does, without HTTP: decode, encode, search, in that order, each in its lane."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from audiomae.corpus.decode import Window
from audiomae.errors import FilterError, IntegrityError, UserError
from audiomae.search.audio_index import AudioIndex
from serve import audio, media
from serve.admission import Lane
from serve.answers import collapse, merge_windows, rankings
from serve.arguments import ServeArgs
from serve.catalogue import Catalogue
from serve.encoder import BatchingEncoder
from serve.problems import Problem
from serve.quality import RecallShadow
from serve.queries import WHOLE, Answer, Embedded, EncoderInfo, Region, Wanted, check_filter, check_vectors, unit
from serve.schema import Timing
from serve.shards import IndexShards
from serve.versions import SharedVersion, VersionCache

T = TypeVar("T")
ATTEMPTS = 3
RECHECK_S = 1.0
READY_S = 5.0
SHARDS_START_S = 120.0  # after which a replica is ready without a shard that never came
RELOAD_S = 900.0
AWAY = 0.5  # how far the excluded examples push a query away from their mean
SMALL_HITS, INLINE_MS = 100, 2.0
HEAVY_HITS = 1_000  # an answer of more hits than this goes the lane of the heavy ones


@dataclass(frozen=True)
class Serving:
    """The release that a request is answered from, first to last."""

    version: str
    encoder: EncoderInfo
    catalogue: Catalogue

    @property
    def window_s(self) -> float:
        """Seconds of a query window: that of the indexed corpus, so that like is compared with like."""
        return self.catalogue.window_s or self.encoder.window_s


@dataclass(frozen=True)
class Sound:
    """A sound to search with: the bytes of an upload, or an item of the index; and the stretch of it that counts."""

    data: bytes = b""
    clip: int | None = None
    region: Region = WHOLE


@dataclass
class Mixed:
    """Several sounds, vectors and words as one query."""

    include: list[Sound | np.ndarray] = field(default_factory=list)
    exclude: list[Sound | np.ndarray] = field(default_factory=list)
    text: str | None = None

    @property
    def clips(self) -> set[int]:
        """Ids of the items that are examples: they are no hits."""
        sounds = (sound for sound in (*self.include, *self.exclude) if isinstance(sound, Sound))
        return {sound.clip for sound in sounds if sound.clip is not None}


class SearchService:
    """Answers queries from the serving release and swaps releases under load.

    Args:
        args: the service's arguments.
        encoder: handle of `serve.encoder.Encoder`.
        shared: the version that all replicas have agreed on.
        local: whether short queries are encoded in this process.
        shards: those that have the vectors; None when the index is searched in this process.
    """

    def __init__(
        self,
        args: ServeArgs,
        encoder: DeploymentHandle,
        shared: SharedVersion,
        local: bool = True,
        shards: IndexShards | None = None,
    ) -> None:
        self.args, self._remote, self._shared, self.shards = args, encoder, shared, shards
        self._local = BatchingEncoder(args) if local else None
        self._catalogues: VersionCache[Catalogue] = VersionCache(self._open)
        short_places = 2 * args.max_batch_size
        self.lanes = {
            "short": Lane("short upload", short_places, args.max_wait_s, min_queue=64, unit_s=0.02),
            "long": Lane("long upload", 8, 20 * args.max_wait_s, min_queue=8, unit_s=0.05),
            "light": Lane("search", 8, args.max_wait_s, min_queue=64, unit_s=0.001),
            "heavy": Lane("large search", 1, 10 * args.max_wait_s, min_queue=2, unit_s=0.0001),
            "media": Lane("item", 2, 5 * args.max_wait_s, min_queue=64, unit_s=0.02),
        }
        self._threads = {
            name: ThreadPoolExecutor(lane.places, thread_name_prefix=name) for name, lane in self.lanes.items()
        }
        self.shadow = RecallShadow(args.recall_shadow)
        self._small_ms = 0.0  # what a small search takes, as measured
        self._serving: Serving | None = None
        self._checked_at, self._started = 0.0, time.monotonic()
        self._switching = asyncio.Lock()

    # --- which release ----------------------------------------------------------------------------------------------

    def open(self, version: str) -> None:
        """Open a release before the first request; blocks."""
        catalogue = self._catalogues.get(version)
        if self._local is not None:
            self._serving = joined(version, self._local.load(version), catalogue)

    async def serving(self) -> Serving:
        """The release to answer from. The shared choice is looked at again when the last look is over a second old."""
        now = time.monotonic()
        if self._serving is None or now - self._checked_at > RECHECK_S:
            self._checked_at = now
            version = await asyncio.to_thread(self._shared.get)
            if self._serving is None or self._serving.version != version:
                async with self._switching:
                    if self._serving is None or self._serving.version != version:
                        self._serving = await self.describe(version)
        return self._serving

    @property
    def serving_now(self) -> Serving | None:
        """The release that was last answered from, without a look at the shared choice."""
        return self._serving

    async def check(self) -> Serving:
        """The serving release, after the encoder, and every shard once, has answered.

        Raises:
            Problem: 503 `not_ready` when one of them has not within five seconds.
        """
        if self.shards is not None and time.monotonic() < self._started + SHARDS_START_S:
            unseen = await asyncio.to_thread(self.shards.never_seen, READY_S)
            if unseen:
                detail = f"{', '.join(unseen)} gave no sign within {READY_S:g} s"
                raise Problem(503, "not_ready", detail, headers={"Retry-After": "1"})
        try:
            async with asyncio.timeout(READY_S):
                serving = await self.serving()
                await self._call(self._remote.load, serving.version)
                return serving
        except TimeoutError:
            headers = {"Retry-After": "1"}
            raise Problem(503, "not_ready", f"encoder gave no sign within {READY_S:g} s", headers=headers) from None

    async def describe(self, version: str) -> Serving:
        """Release `version`, opened and checked in this process and in an encoder replica."""
        catalogue, encoder = await asyncio.gather(
            asyncio.to_thread(self._catalogues.get, version),
            asyncio.to_thread(self._local.load, version) if self._local else self._call(self._remote.load, version),
        )
        return joined(version, encoder, catalogue)

    async def reload(self, concrete: str, siblings: Callable[[str], Awaitable[Any]]) -> Serving:
        """Swap to release `concrete` once every replica has opened and checked it; the old one serves until then.

        Args:
            concrete: the version.
            siblings: makes every API replica open a version.

        Raises:
            Problem: 404 `unknown_release` or 409 `release_refused`; what was being served goes on being served.
        """
        try:
            await asyncio.gather(
                siblings(concrete),
                self._remote.broadcast("load", concrete).results_async(timeout_s=RELOAD_S),
                *(client.load(concrete, RELOAD_S) for client in (self.shards.clients if self.shards else ())),
            )
            serving = await self.describe(concrete)
        except Exception as error:
            raise refusal(error) from error
        await asyncio.to_thread(self._shared.set, concrete)
        async with self._switching:
            self._serving = serving
        return serving

    # --- searches ---------------------------------------------------------------------------------------------------

    async def search_sound(self, sound: Sound, wanted: Wanted, by_window: bool = False) -> Answer:
        """Hits for a sound: like all of it, or (`by_window`) like any of its windows."""
        serving = await self.serving()
        checked = self._checked(serving, wanted)
        embedded = await self._embed(serving, sound)
        without = set() if sound.clip is None else {sound.clip}
        queries = embedded.vectors if by_window else audio.clip_vector(embedded.vectors)[None]
        answer = await self._find(serving, queries, wanted, checked, without, embedded.timing)
        if by_window:
            answer.results = [merge_windows(answer.results, embedded.spans, wanted.k)]
        return answer

    async def search_vectors(self, vectors: Any, wanted: Wanted) -> Answer:
        """Hits for each of the given vectors (lists of numbers), which are scaled to unit length first."""
        serving = await self.serving()
        checked = self._checked(serving, wanted)
        queries = check_vectors(vectors, serving.catalogue.dim, self.args.max_vectors)
        return await self._find(serving, queries, wanted, checked)

    async def search_mixed(self, mixed: Mixed, wanted: Wanted) -> Answer:
        """Hits near the mean of the included examples (and words), away from the mean of the excluded ones."""
        serving = await self.serving()
        checked = self._checked(serving, wanted)
        timing = Timing()
        include = [await self._vector_of(serving, example, timing) for example in mixed.include]
        exclude = [await self._vector_of(serving, example, timing) for example in mixed.exclude]
        if mixed.text is not None:
            include.append(await self._text_vector(serving, mixed.text, timing))
        if not include and not exclude:
            raise Problem(422, "invalid_request", "nothing to search with: give a file, text or examples")
        query = np.zeros(serving.catalogue.dim) if not include else np.mean(include, axis=0)
        if exclude:
            query = query - (AWAY if include else 1.0) * np.mean(exclude, axis=0)
        return await self._find(serving, unit(query[None]), wanted, checked, mixed.clips, timing)

    async def search_similar(self, clip: int, wanted: Wanted) -> Answer:
        """Hits for an item of the index; itself, and with files as hits its file, excluded."""
        serving = await self.serving()
        checked = self._checked(serving, wanted)
        query = await self._stored(serving, clip)
        return await self._find(serving, query[None], wanted, checked, {clip})

    async def embed(self, data: bytes, region: Region) -> tuple[Serving, Embedded]:
        """Unit vectors of an upload's windows."""
        serving = await self.serving()
        return serving, await self._embed(serving, Sound(data, region=region))

    async def item(self, clip: int) -> tuple[Serving, dict[str, Any]]:
        """The row of item `clip`."""
        serving = await self.serving()
        row = await self.in_lane("light", 1, serving.catalogue.item, clip)
        if row is None:
            raise unknown_id(clip, serving.version)
        return serving, row

    def shed(self, method: str, path: str) -> None:
        """Raise the problem of a request that comes while its lane is full, before its body is read."""
        if method == "POST" and path in ("/search", "/embed"):
            self.lanes["short"].refuse_early()

    async def filtered(self, function: Callable[..., T], *args: Any) -> T:
        """Run a search of the items table, in its lane; 422 `bad_filter` when the filter does not fit it."""
        try:
            return await self.in_lane("light", 1, function, *args)
        except FilterError as error:
            raise Problem(422, "bad_filter", str(error)) from error

    async def in_lane(self, lane: str, cost: float, function: Callable[..., T], *args: Any) -> T:
        """Run blocking work off the event loop, in its lane and within the time that a request has."""
        deadline = time.monotonic() + self.args.request_timeout_s
        async with self.lanes[lane].place(cost, deadline):
            work = asyncio.get_running_loop().run_in_executor(self._threads[lane], function, *args)
            return await self._bounded(work, deadline - time.monotonic(), lane)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self, version: str) -> Catalogue:
        divided = self.shards.divided(version) if self.shards else None
        return Catalogue(AudioIndex.open(self.args.index, version=version, divided=divided))

    def _checked(self, serving: Serving, wanted: Wanted) -> dict[str, Any] | None:
        if not 1 <= wanted.k <= self.args.max_k:
            raise Problem(422, "bad_k", f"k is {wanted.k}; expected 1 to {self.args.max_k}")
        return check_filter(wanted.filter, serving.catalogue.columns)

    async def _find(
        self,
        serving: Serving,
        queries: np.ndarray,
        wanted: Wanted,
        filter: dict[str, Any] | None,
        without: set[int] = frozenset(),  # type: ignore[assignment]
        timing: Timing | None = None,
    ) -> Answer:
        timing = timing or Timing()
        hits = len(queries) * wanted.k
        if hits > self.args.max_hits:
            detail = (
                f"{len(queries)} queries x k={wanted.k} are {hits:,} hits; at most {self.args.max_hits:,} in one answer"
            )
            raise Problem(422, "too_many_hits", detail)
        lane = "light" if hits <= HEAVY_HITS else "heavy"
        began = time.perf_counter()
        small = filter is None and hits <= SMALL_HITS and self._small_ms < INLINE_MS and self.shards is None
        try:
            if small:  # a search of less than a millisecond or so is over before a thread has begun
                results, spent, missing = find(serving.catalogue, queries, wanted, filter, without, self.shadow)
                self._small_ms += 0.05 * (spent - self._small_ms)
            else:
                work = self.in_lane(lane, hits, find, serving.catalogue, queries, wanted, filter, without, self.shadow)
                results, spent, missing = await work
                self._small_ms *= 0.99  # so that it is tried again
        except FilterError as error:
            raise Problem(422, "bad_filter", str(error)) from error
        timing.search += spent
        timing.queue += max(0.0, milliseconds(began) - spent)
        return Answer(serving.version, results, timing, missing)

    async def _stored(self, serving: Serving, clip: int) -> np.ndarray:
        def vector() -> np.ndarray | None:
            try:
                return serving.catalogue.index.vector(clip)
            except KeyError:
                return None

        found = await self.in_lane("light", 1, vector)
        if found is None:
            raise unknown_id(clip, serving.version)
        return found

    async def _vector_of(self, serving: Serving, example: Sound | np.ndarray, timing: Timing) -> np.ndarray:
        if isinstance(example, np.ndarray):
            return check_vectors([example.tolist()], serving.catalogue.dim, 1)[0]
        if example.clip is not None and not example.region:
            return await self._stored(serving, example.clip)
        embedded = await self._embed(serving, example, timing)
        return audio.clip_vector(embedded.vectors)

    async def _text_vector(self, serving: Serving, text: str, timing: Timing) -> np.ndarray:
        if serving.encoder.text_reason is not None:
            detail = f"release {serving.version} cannot be searched by text: {serving.encoder.text_reason}"
            raise Problem(501, "no_text_tower", detail)
        began = time.perf_counter()
        if self._local is not None:
            vectors = await self.in_lane("short", 1, self._local.encode_text, serving.version, [text])
        else:
            vectors = await self._call(self._remote.encode_text, serving.version, [text])
        timing.encode += milliseconds(began)
        return vectors[0]

    async def _embed(self, serving: Serving, sound: Sound, timing: Timing | None = None) -> Embedded:
        timing = timing or Timing()
        source, region = await self._source(serving, sound)
        began = time.perf_counter()
        short = await self.in_lane("short", 1, self._embed_short, serving, source, region, timing)
        if isinstance(short, Embedded):
            timing.queue += max(0.0, milliseconds(began) - timing.decode - timing.encode)
            return short
        if short is not None:
            began = time.perf_counter()
            vectors = await self._call(self._remote.encode, serving.version, [window.samples for window in short])
            timing.encode += milliseconds(began)
            return Embedded(vectors, [(window.start_s, window.end_s) for window in short], timing)
        if not isinstance(source, bytes):
            raise Problem(
                422, "region_too_long", f"a stretch of an item may last {self.args.short_audio_s:g} s at most"
            )
        cost = max(1.0, len(source) / 2**20)
        began = time.perf_counter()
        deadline = time.monotonic() + 4 * self.args.request_timeout_s
        async with self.lanes["long"].place(cost, deadline):
            call = self._remote.embed_upload
            spans, vectors = await self._call(call, serving.version, source, serving.window_s, region)
        timing.encode += milliseconds(began)
        return Embedded(vectors, spans, timing)

    async def _source(self, serving: Serving, sound: Sound) -> tuple[Any, Region]:
        if sound.clip is None:
            return sound.data, sound.region
        row = await self.in_lane("light", 1, serving.catalogue.item, sound.clip)
        if row is None:
            raise unknown_id(sound.clip, serving.version)
        root = serving.catalogue.index.corpus_root(row)
        source = await self.in_lane("media", 1, media.find, root, row)
        return source, sound.region or Region(row["start_s"], row["end_s"])

    def _embed_short(
        self, serving: Serving, source: Any, region: Region, timing: Timing
    ) -> Embedded | list[Window] | None:
        """Vectors of a short sound; its windows where another process encodes; `None` for a long one."""
        began = time.perf_counter()
        windows: list[Window] = []
        for window in audio.decode_query(source, serving.encoder.sample_rate, serving.window_s, self.args, region):
            windows.append(window)
            if window.end_s - windows[0].start_s > max(self.args.short_audio_s, serving.window_s):
                return None
        timing.decode += milliseconds(began)
        if self._local is None:
            return windows
        began = time.perf_counter()
        samples = [window.samples for window in windows]
        try:
            vectors = self._local.encode(serving.version, samples, self.args.request_timeout_s)
        except TimeoutError:
            raise timed_out("the encoder", self.args.request_timeout_s) from None
        timing.encode += milliseconds(began)
        return Embedded(vectors, [(window.start_s, window.end_s) for window in windows], timing)

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call the encoder deployment; a replica that died under the call is replaced by another one, twice."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._bounded(method.remote(*args), 4 * self.args.request_timeout_s, "the encoder")
            except RayTaskError as error:
                cause = getattr(error, "cause", None)
                raise cause if isinstance(cause, Problem | IntegrityError | UserError) else error from None
            except (ActorDiedError, ActorUnavailableError) as error:
                if attempt == ATTEMPTS:
                    raise try_again("replica_lost", error) from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise try_again("overloaded", error) from error

    async def _bounded(self, work: Awaitable[T], seconds: float, what: str) -> T:
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise timed_out(what, seconds) from None


def find(
    catalogue: Catalogue,
    queries: np.ndarray,
    wanted: Wanted,
    filter: dict[str, Any] | None,
    without: set[int],
    shadow: RecallShadow,
) -> tuple[list[list[dict[str, Any]]], float, tuple[str, ...]]:
    """Hits of each query as JSON-ready dicts, the milliseconds it took, and shards that did not answer."""
    began = time.perf_counter()
    by_file = wanted.group == "file"
    extra = len(without) + (wanted.k if wanted.collapse else 0)
    hits = catalogue.search(queries, min(wanted.k + extra, max(1, catalogue.rows)), filter, by_file)
    if filter is None and hits.windows is None and not hits.missing:
        shadow.watch(catalogue.index, queries, hits.scores.shape[1], hits.scores)
    results = rankings(hits, by_file, catalogue.calibration)
    if without:
        files = {row["uri"] for row in map(catalogue.item, without) if row is not None} if by_file else set()
        results = [[hit for hit in hits if hit["id"] not in without and hit["uri"] not in files] for hits in results]
    if wanted.collapse:
        results = [collapse(ranking, catalogue.index.vector) for ranking in results]
    return [ranking[: wanted.k] for ranking in results], milliseconds(began), hits.missing


def joined(version: str, encoder: EncoderInfo, catalogue: Catalogue) -> Serving:
    """Encoder and index of one release; they never meet when their fingerprints differ."""
    if encoder.fingerprint != catalogue.fingerprint:
        raise IntegrityError(
            f"release {version}: encoder fingerprint {encoder.fingerprint} is not the index's {catalogue.fingerprint}"
        )
    return Serving(version, encoder, catalogue)


def milliseconds(began: float) -> float:
    """Since `began`, of `time.perf_counter()`."""
    return (time.perf_counter() - began) * 1000


def try_again(code: str, error: BaseException) -> Problem:
    """503 for what passes by itself."""
    return Problem(503, code, f"{reason(error)}; try again", headers={"Retry-After": "1"})


def refusal(error: BaseException) -> BaseException:
    """Why a release is not swapped to, as an answer; what is none of these goes on as it is."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, TimeoutError):
        return Problem(504, "timeout", f"not every replica opened the release within {RELOAD_S:g} s")
    if isinstance(cause, UserError):
        return Problem(404, "unknown_release", str(cause))
    if isinstance(cause, IntegrityError):
        return Problem(409, "release_refused", str(cause))
    if isinstance(cause, (ActorDiedError, ActorUnavailableError, BackPressureError, DeploymentUnavailableError)):
        return try_again("replica_lost", error)  # its replacement is starting
    return error


def timed_out(what: str, seconds: float) -> Problem:
    """504 for what did not come in time."""
    return Problem(504, "timeout", f"no answer from {what} within {seconds:g} s", headers={"Retry-After": "5"})


def reason(error: BaseException) -> str:
    """The message of an error, without the remote traceback that Ray adds to one from another process."""
    return str(getattr(error, "cause", None) or error)


def unknown_id(clip: int, version: str) -> Problem:
    """404 for an id that the serving release does not hold."""
    return Problem(404, "unknown_id", f"no item {clip} in release {version}")
