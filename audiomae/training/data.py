"""The batches of a training run: read ahead from the feature cache, and a function of the step number alone."""

import queue
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from audiomae.artifacts.features import FeatureStore
from audiomae.artifacts.shard_cache import GIB
from audiomae.training.sampling import Sampler

DEPTH = 4  # batches read ahead


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimiser step.

    `clips` int64[B] are rows of the item table, `features` float16[V, B, R, F] the V views of each clip before
    augmentation.
    """

    step: int
    clips: npt.NDArray[np.int64]
    features: npt.NDArray[np.float16]


def cache_caution(
    shards: npt.ArrayLike, frames: npt.ArrayLike, bands: int, shuffle_shards: int, cache_gib: float
) -> str | None:
    """What to know of a cache on S3 that a node must read more than once in an epoch, if it is one.

    Args:
        shards, frames: int[N] where each clip lies and how long it is.
        bands: mel bands of a frame, float16 each.
        shuffle_shards, cache_gib: settings of `data`.
    """
    sizes = np.bincount(np.asarray(shards), weights=np.asarray(frames)) * bands * 2 / GIB
    at_once = float(np.sort(sizes)[-2 * shuffle_shards :].sum())  # this window of shards and the next
    if cache_gib >= at_once:
        return None
    return (
        f"data.cache_gib {cache_gib:g} holds less than the features read at a time ({at_once:.3g} GiB, two windows of "
        f"data.shuffle_shards {shuffle_shards}): a node that has all workers fetches them more than once an epoch; "
        "raise the one or lower the other"
    )


class Loader:
    """Reads batches ahead in a thread and counts how long training waited for them.

    Args:
        store: features.
        sampler: which clips.
        frames: frames to read per view (R).
        crops: frames that each of the V views is cut from; a crop shorter than R is repeated to fill it.
        rank, world_size: this worker's share.
    """

    def __init__(
        self,
        store: FeatureStore,
        sampler: Sampler,
        frames: int,
        crops: Sequence[int],
        rank: int,
        world_size: int,
    ) -> None:
        self.store, self.sampler, self.frames, self.crops = store, sampler, frames, np.asarray(crops)
        self.rank, self.world_size = rank, world_size
        self.waited_s = 0.0

    def read(self, step: int) -> Batch:
        """The batch of a step; crop positions are drawn from (seed, step, rank)."""
        clips = self.sampler.local_batch(step, self.rank, self.world_size)
        views = len(self.crops)
        features = np.empty((views, len(clips), self.frames, self.store.bands), np.float16)
        room = np.maximum(self.store.frames[clips] - self.crops[:, None], 0)
        draw = np.random.default_rng([self.sampler.seed, step, self.rank, 1])
        starts = draw.integers(0, room + 1, size=(views, len(clips)))
        for view, length in enumerate(self.crops):
            again = np.arange(self.frames) % length
            for row, clip in enumerate(clips):
                self.store.read(int(clip), int(starts[view, row]), int(length), features[view, row, :length])
            if length < self.frames:
                features[view] = features[view][:, again]
        return Batch(step, clips, features)

    def _fetch_ahead(self, step: int, first_step: int) -> None:
        """Twice a block, and at the start of an epoch, fetch the shards of this block and the next."""
        every = max(1, self.sampler.block_steps // 2)
        if step == first_step or step % self.sampler.steps_per_epoch % every == 0:
            self.store.cache.prefetch(self.sampler.shards_ahead(step, self.rank, self.world_size).tolist())

    def batches(self, first_step: int, end_step: int) -> Generator[Batch]:
        """Batches of steps `first_step` to `end_step - 1`, read ahead."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(DEPTH)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(first_step, end_step):
                    if stop.is_set():
                        return
                    self._fetch_ahead(step, first_step)
                    put(self.read(step))
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="feature-reader", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, end_step):
                began = time.perf_counter()
                item = ready.get()
                self.waited_s += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
