"""The release that is being served: opened in this process, agreed on with all replicas, swapped under load."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audiomae.errors import IntegrityError
from audiomae.search.audio_index import AudioIndex
from serve.catalogue import Catalogue
from serve.failures import RELOAD_S, refusal
from serve.problems import Problem
from serve.queries import EncoderInfo
from serve.shards import IndexShards
from serve.versions import SharedVersion, VersionCache

if TYPE_CHECKING:
    from serve.query_encoder import QueryEncoder

RECHECK_S = 1.0
READY_S = 5.0
SHARDS_START_S = 120.0  # after which a replica is ready without a shard that never came


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


class ServedRelease:
    """Which release this process answers from.

    Args:
        index_dir: INDEX.
        shared: the version that all replicas have agreed on.
        encoder: of queries.
        shards: those that have the vectors; None when the index is searched in this process.
    """

    def __init__(
        self, index_dir: str, shared: SharedVersion, encoder: "QueryEncoder", shards: IndexShards | None
    ) -> None:
        self._index_dir, self._shared, self._encoder, self._shards = index_dir, shared, encoder, shards
        self._catalogues: VersionCache[Catalogue] = VersionCache(self._open)
        self._serving: Serving | None = None
        self._checked_at, self._started = 0.0, time.monotonic()
        self._switching = asyncio.Lock()

    def open(self, version: str) -> None:
        """Open a release before the first request; blocks."""
        catalogue, encoder = self._catalogues.get(version), self._encoder.load_here(version)
        if encoder is not None:
            self._serving = joined(version, encoder, catalogue)

    async def current(self) -> Serving:
        """The release to answer from. The shared choice is looked at again when the last look is over a second old."""
        now = time.monotonic()
        if self._serving is None or now - self._checked_at > RECHECK_S:
            self._checked_at = now
            async with self._switching:  # a choice read before a reload would undo it after
                version = await asyncio.to_thread(self._shared.get)
                if self._serving is None or self._serving.version != version:
                    self._serving = await self.describe(version)
        return self._serving

    @property
    def last(self) -> Serving | None:
        """The release that was last answered from, without a look at the shared choice."""
        return self._serving

    async def check(self) -> Serving:
        """The serving release, after the encoder, and every shard once, has answered.

        Raises:
            Problem: 503 `not_ready` when one of them has not within five seconds.
        """
        if self._shards is not None and time.monotonic() < self._started + SHARDS_START_S:
            unseen = await asyncio.to_thread(self._shards.never_seen, READY_S)
            if unseen:
                detail = f"{', '.join(unseen)} gave no sign within {READY_S:g} s"
                raise Problem(503, "not_ready", detail, headers={"Retry-After": "1"})
        try:
            async with asyncio.timeout(READY_S):
                serving = await self.current()
                await self._encoder.load_elsewhere(serving.version)
                return serving
        except TimeoutError:
            headers = {"Retry-After": "1"}
            raise Problem(503, "not_ready", f"encoder gave no sign within {READY_S:g} s", headers=headers) from None

    async def describe(self, version: str) -> Serving:
        """Release `version`, opened and checked in this process and in an encoder replica."""
        catalogue, encoder = await asyncio.gather(
            asyncio.to_thread(self._catalogues.get, version), self._encoder.load(version)
        )
        return joined(version, encoder, catalogue)

    async def follow(self) -> None:
        """Answer from the shared choice from now on."""
        self._checked_at = 0.0
        await self.current()

    async def reload(
        self, concrete: str, siblings: Callable[[str], Awaitable[Any]], follow: Callable[[], Awaitable[Any]]
    ) -> Serving:
        """Swap to release `concrete` once every replica has opened and checked it; the old one serves until then.

        Args:
            concrete: the version.
            siblings: makes every API replica open a version.
            follow: makes every API replica look at the shared choice; one that is out of reach will within a second.

        Raises:
            Problem: 404 `unknown_release` or 409 `release_refused`; what was being served goes on being served.
        """
        try:
            await asyncio.gather(
                siblings(concrete),
                self._encoder.load_everywhere(concrete, RELOAD_S),
                *(client.load(concrete, RELOAD_S) for client in (self._shards.clients if self._shards else ())),
            )
            serving = await self.describe(concrete)
        except Exception as error:
            raise refusal(error) from error
        await asyncio.to_thread(self._shared.set, concrete)
        async with self._switching:
            self._serving = serving
        with contextlib.suppress(Exception):
            await follow()
        return serving

    def _open(self, version: str) -> Catalogue:
        divided = self._shards.divided(version) if self._shards else None
        return Catalogue(AudioIndex.open(self._index_dir, version=version, divided=divided))


def joined(version: str, encoder: EncoderInfo, catalogue: Catalogue) -> Serving:
    """Encoder and index of one release; they never meet when their fingerprints differ."""
    if encoder.fingerprint != catalogue.fingerprint:
        raise IntegrityError(
            f"release {version}: encoder fingerprint {encoder.fingerprint} is not the index's {catalogue.fingerprint}"
        )
    return Serving(version, encoder, catalogue)
