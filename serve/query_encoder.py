"""Queries as vectors: decoded and encoded in this process where they are short, else by the deployment `Encoder`."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from audiomae.corpus.decode import Window
from audiomae.errors import IntegrityError, UserError
from serve import audio, media
from serve.arguments import ServeArgs
from serve.encoder import BatchingEncoder
from serve.failures import timed_out, try_again, unknown_id
from serve.lanes import Lanes, bounded
from serve.problems import Problem
from serve.queries import Embedded, EncoderInfo, Region, Sound, milliseconds
from serve.schema import Timing
from serve.serving import Serving

ATTEMPTS = 3
CALM_S = 0.25  # without two requests at a time
Encode = Callable[[str, Sequence[np.ndarray], float], np.ndarray]


class QueryEncoder:
    """Makes vectors of sounds and words.

    Args:
        args: the service's arguments.
        remote: handle of `serve.encoder.Encoder`.
        lanes: where the work is done.
        local: whether short queries are encoded in this process.
    """

    def __init__(self, args: ServeArgs, remote: DeploymentHandle, lanes: Lanes, local: bool) -> None:
        self._args, self._remote, self._lanes = args, remote, lanes
        self._local = BatchingEncoder(args, args.processes) if local else None
        self._crowded_at = -math.inf

    def load_here(self, version: str) -> EncoderInfo | None:
        """Make the encoder of a release ready in this process; blocks. None where this process does not encode."""
        return self._local.load(version) if self._local else None

    async def load(self, version: str) -> EncoderInfo:
        """Make the encoder of a release ready: in this process, or else in one of the deployment."""
        if self._local is None:
            return await self.load_elsewhere(version)
        return await asyncio.to_thread(self._local.load, version)

    async def load_elsewhere(self, version: str) -> EncoderInfo:
        """Make the encoder of a release ready in the deployment."""
        info: EncoderInfo = await self._call(self._remote.load, version)
        return info

    async def load_everywhere(self, version: str, timeout_s: float) -> None:
        """Make the encoder of a release ready in all replicas of the deployment."""
        await self._remote.broadcast("load", version).results_async(timeout_s=timeout_s)

    async def text_vector(self, serving: Serving, text: str, timing: Timing) -> np.ndarray:
        """The unit vector float32[dim] of words; 501 where the release does not understand any."""
        if serving.encoder.text_reason is not None:
            detail = f"release {serving.version} cannot be searched by text: {serving.encoder.text_reason}"
            raise Problem(501, "no_text_tower", detail)
        began = time.perf_counter()
        if self._local is not None:
            vectors = await self._lanes.run("short", 1, self._local.encode_text, serving.version, [text])
        else:
            vectors = await self._call(self._remote.encode_text, serving.version, [text])
        timing.encode += milliseconds(began)
        return vectors[0]

    async def embed(self, serving: Serving, sound: Sound, timing: Timing | None = None) -> Embedded:
        """Unit vectors of a sound's windows."""
        timing = timing or Timing()
        source, region = await self._source(serving, sound)
        began = time.perf_counter()
        encode, by = self._way()
        short = await self._lanes.run("short", 1, self._embed_short, serving, source, region, timing, encode, by=by)
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
                422, "region_too_long", f"a stretch of an item may last {self._args.short_audio_s:g} s at most"
            )
        cost = max(1.0, len(source) / 2**20)
        began = time.perf_counter()
        async with self._lanes.place("long", cost, 4 * self._args.request_timeout_s):
            call = self._remote.embed_upload
            spans, vectors = await self._call(call, serving.version, source, serving.window_s, region)
        timing.encode += milliseconds(began)
        return Embedded(vectors, spans, timing)

    def _way(self) -> tuple[Encode | None, Executor | None]:
        """How windows are encoded here (None: elsewhere), and by which thread, while requests come one at a time."""
        if self._local is None:
            return None, None
        if not self._lanes.is_free("short"):
            self._crowded_at = time.monotonic()
        elif time.monotonic() - self._crowded_at > CALM_S:
            return self._local.encode_alone, self._local.leader
        return self._local.encode, None

    async def _source(self, serving: Serving, sound: Sound) -> tuple[Any, Region]:
        if sound.clip is None:
            return sound.data, sound.region
        row = await self._lanes.run("light", 1, serving.catalogue.item, sound.clip)
        if row is None:
            raise unknown_id(sound.clip, serving.version)
        root = serving.catalogue.index.corpus_root(row)
        source = await self._lanes.run("media", 1, media.find, root, row)
        return source, sound.region or Region(row["start_s"], row["end_s"])

    def _embed_short(
        self, serving: Serving, source: Any, region: Region, timing: Timing, encode: Encode | None
    ) -> Embedded | list[Window] | None:
        """Vectors of a short sound; its windows where another process encodes; `None` for a long one."""
        began = time.perf_counter()
        windows: list[Window] = []
        for window in audio.decode_query(source, serving.encoder.sample_rate, serving.window_s, self._args, region):
            windows.append(window)
            if window.end_s - windows[0].start_s > max(self._args.short_audio_s, serving.window_s):
                return None
        timing.decode += milliseconds(began)
        if encode is None:
            return windows
        began = time.perf_counter()
        samples = [window.samples for window in windows]
        try:
            vectors = encode(serving.version, samples, self._args.request_timeout_s)
        except TimeoutError:
            raise timed_out("the encoder", self._args.request_timeout_s) from None
        timing.encode += milliseconds(began)
        return Embedded(vectors, [(window.start_s, window.end_s) for window in windows], timing)

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call the encoder deployment; a replica that died under the call is replaced by another one, twice."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await bounded(method.remote(*args), 4 * self._args.request_timeout_s, "the encoder")
            except RayTaskError as error:
                cause = getattr(error, "cause", None)
                raise cause if isinstance(cause, Problem | IntegrityError | UserError) else error from None
            except (ActorDiedError, ActorUnavailableError) as error:
                if attempt == ATTEMPTS:
                    raise try_again("replica_lost", error) from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise try_again("overloaded", error) from error
