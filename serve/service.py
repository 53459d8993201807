"""What a request does, without HTTP: embed, search, in that order."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
from ray.serve.handle import DeploymentHandle

from audiomae.errors import FilterError
from serve import audio
from serve.answers import collapse, merge_windows, rankings
from serve.arguments import ServeArgs
from serve.catalogue import Catalogue
from serve.failures import unknown_id
from serve.lanes import Lanes
from serve.problems import Problem
from serve.quality import RecallShadow
from serve.queries import (
    Answer,
    Embedded,
    Mixed,
    Region,
    Sound,
    Wanted,
    check_filter,
    check_vectors,
    milliseconds,
    unit,
)
from serve.query_encoder import QueryEncoder
from serve.schema import Timing
from serve.serving import ServedRelease, Serving
from serve.shards import IndexShards
from serve.versions import SharedVersion

T = TypeVar("T")
AWAY = 0.5  # how far the excluded examples push a query away from their mean
SMALL_HITS, INLINE_MS = 100, 2.0
HEAVY_HITS = 1_000  # an answer of more hits than this goes the lane of the heavy ones


class Searched(NamedTuple):
    """Hits of each query (as in `Answer.results`), the milliseconds it took, and the shards that did not answer."""

    results: list[Any]
    spent_ms: float
    missing: tuple[str, ...]


class SearchService:
    """Answers queries from the serving release.

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
        self.args, self.shards = args, shards
        self.lanes = Lanes(args)
        self._encoder = QueryEncoder(args, encoder, self.lanes, local)
        self.release = ServedRelease(args.index, shared, self._encoder, shards)
        self.shadow = RecallShadow(args.recall_shadow)
        self._small_ms = 0.0  # what a small search takes, as measured

    async def search_sound(self, sound: Sound, wanted: Wanted) -> Answer:
        """Hits for a sound: like all of it, or (`wanted.by_window`) like any of its windows."""
        serving = await self.release.current()
        checked = self._checked(serving, wanted)
        embedded = await self._encoder.embed(serving, sound)
        without = set() if sound.clip is None else {sound.clip}
        queries = embedded.vectors if wanted.by_window else audio.clip_vector(embedded.vectors)[None]
        answer = await self._find(serving, queries, wanted, checked, without, embedded.timing)
        if wanted.by_window:
            answer.results = [merge_windows(answer.results, embedded.spans, wanted.k)]
        return answer

    async def search_vectors(self, vectors: Any, wanted: Wanted) -> Answer:
        """Hits for each of the given vectors (lists of numbers), which are scaled to unit length first."""
        serving = await self.release.current()
        checked = self._checked(serving, wanted)
        queries = check_vectors(vectors, serving.catalogue.dim, self.args.max_vectors)
        return await self._find(serving, queries, wanted, checked)

    async def search_mixed(self, mixed: Mixed, wanted: Wanted) -> Answer:
        """Hits near the mean of the included examples (and words), away from the mean of the excluded ones."""
        serving = await self.release.current()
        checked = self._checked(serving, wanted)
        timing = Timing()
        include = [await self._vector_of(serving, example, timing) for example in mixed.include]
        exclude = [await self._vector_of(serving, example, timing) for example in mixed.exclude]
        if mixed.text is not None:
            include.append(await self._encoder.text_vector(serving, mixed.text, timing))
        if not include and not exclude:
            raise Problem(422, "invalid_request", "nothing to search with: give a file, text or examples")
        query = np.zeros(serving.catalogue.dim) if not include else np.mean(include, axis=0)
        if exclude:
            query = query - (AWAY if include else 1.0) * np.mean(exclude, axis=0)
        return await self._find(serving, unit(query[None]), wanted, checked, mixed.clips, timing)

    async def search_similar(self, clip: int, wanted: Wanted) -> Answer:
        """Hits for an item of the index; itself, and with files as hits its file, excluded."""
        serving = await self.release.current()
        checked = self._checked(serving, wanted)
        query = await self._stored(serving, clip)
        return await self._find(serving, query[None], wanted, checked, {clip})

    async def embed(self, data: bytes, region: Region) -> tuple[Serving, Embedded]:
        """Unit vectors of an upload's windows."""
        serving = await self.release.current()
        return serving, await self._encoder.embed(serving, Sound(data, region=region))

    async def item(self, clip: int) -> tuple[Serving, dict[str, Any]]:
        """The row of item `clip`."""
        serving = await self.release.current()
        row = await self.lanes.run("light", 1, serving.catalogue.item, clip)
        if row is None:
            raise unknown_id(clip, serving.version)
        return serving, row

    async def filtered(self, function: Callable[..., T], *args: Any) -> T:
        """Run a search of the items table, in its lane; 422 `bad_filter` when the filter does not fit it."""
        try:
            return await self.lanes.run("light", 1, function, *args)
        except FilterError as error:
            raise Problem(422, "bad_filter", str(error)) from error

    # --- inside -----------------------------------------------------------------------------------------------------

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
        asked = (serving.catalogue, queries, wanted, filter, without, self.shadow)
        try:
            if small:  # a search of less than a millisecond or so is over before a thread has begun
                found = find(*asked)
                self._small_ms += 0.05 * (found.spent_ms - self._small_ms)
            else:
                found = await self.lanes.run(lane, hits, find, *asked)
                self._small_ms *= 0.99  # so that it is tried again
        except FilterError as error:
            raise Problem(422, "bad_filter", str(error)) from error
        timing.search += found.spent_ms
        timing.queue += max(0.0, milliseconds(began) - found.spent_ms)
        return Answer(serving.version, found.results, timing, found.missing)

    async def _stored(self, serving: Serving, clip: int) -> np.ndarray:
        def vector() -> np.ndarray | None:
            try:
                return serving.catalogue.index.vector(clip)
            except KeyError:
                return None

        found = await self.lanes.run("light", 1, vector)
        if found is None:
            raise unknown_id(clip, serving.version)
        return found

    async def _vector_of(self, serving: Serving, example: Sound | np.ndarray, timing: Timing) -> np.ndarray:
        if isinstance(example, np.ndarray):
            return check_vectors([example.tolist()], serving.catalogue.dim, 1)[0]
        if example.clip is not None and not example.region:
            return await self._stored(serving, example.clip)
        embedded = await self._encoder.embed(serving, example, timing)
        return audio.clip_vector(embedded.vectors)


def find(
    catalogue: Catalogue,
    queries: np.ndarray,
    wanted: Wanted,
    filter: dict[str, Any] | None,
    without: set[int],
    shadow: RecallShadow,
) -> Searched:
    """What a search of the catalogue gives each query; as JSON where nothing is to be done with it."""
    began = time.perf_counter()
    by_file = wanted.group == "file"
    extra = len(without) + (wanted.k if wanted.collapse else 0)
    hits = catalogue.search(queries, min(wanted.k + extra, max(1, catalogue.rows)), filter, by_file)
    if filter is None and hits.windows is None and not hits.missing:
        shadow.watch(catalogue.index, queries, hits.scores.shape[1], hits.scores)
    ranked = rankings(hits, by_file, catalogue.calibration, catalogue.written)
    if not extra and not wanted.by_window:
        return Searched([orjson.Fragment(ranking) for ranking in ranked], milliseconds(began), hits.missing)
    results = [orjson.loads(ranking) for ranking in ranked]
    if without:
        files = {row["uri"] for row in map(catalogue.item, without) if row is not None} if by_file else set()
        results = [[hit for hit in hits if hit["id"] not in without and hit["uri"] not in files] for hits in results]
    if wanted.collapse:
        results = [collapse(ranking, catalogue.index.vectors) for ranking in results]
    return Searched([ranking[: wanted.k] for ranking in results], milliseconds(began), hits.missing)
