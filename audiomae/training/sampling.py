"""Which clips a step trains on: a function of (seed, step) alone, so that a run's state is its step number."""

import numpy as np
import numpy.typing as npt

LANES = 8  # an epoch's order is cut into so many, whatever number of workers there is


class Sampler:
    """The clips of each step: a fresh order of all clips per epoch, cut into global batches.

    Every rank and every restart agrees, and the batches do not depend on how many ranks there are. The rest of an epoch
    that does not fill a batch is left out; fewer clips than one batch are repeated to fill it.

    With few shards the order is a permutation of all clips. With more than `shuffle_shards` of them the shards are
    permuted, cut into 8 lanes, and clips are shuffled among neighbours: those of `shuffle_shards` shards, all lanes
    together. A step takes equally many clips of every lane, and a rank reads its lanes alone: of W ranks each needs 1/W
    of the shards in an epoch, a few of them at a time. (The seeded order, the fixed number of lanes and the shuffle
    blocks follow MosaicML Streaming, whose format and download protocol would add nothing to receipts and checksums.)

    Args:
        clips: int[N] clips to train on.
        batch_size: of all ranks together.
        shards: int[all clips] the shard each clip lies in; `None` shuffles all clips.
        shuffle_shards: how many shards are read at a time.
    """

    def __init__(
        self,
        clips: npt.ArrayLike,
        batch_size: int,
        seed: int,
        shards: npt.ArrayLike | None = None,
        shuffle_shards: int = 64,
    ) -> None:
        self.clips = np.asarray(clips, np.int64)
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = max(1, len(self.clips) // batch_size)
        self.shards = None if shards is None else np.asarray(shards)
        self.lanes = 1
        count = 0 if self.shards is None else len(np.unique(self.shards[self.clips]))
        self.windowed = count > shuffle_shards and len(self.clips) >= batch_size
        if self.windowed:
            self.lanes = next(
                lanes for lanes in (LANES, 4, 2, 1) if batch_size % lanes == 0 and shuffle_shards >= lanes
            )
            self.block = max(batch_size // self.lanes, shuffle_shards * len(self.clips) // (count * self.lanes))
        self._epoch, self._order = -1, self.clips[None]

    def global_batch(self, step: int) -> npt.NDArray[np.int64]:
        """int64[batch_size] clips of one step, all ranks together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.lanes
        return self._lanes_of(epoch)[:, position * share : (position + 1) * share].reshape(-1)

    def local_batch(self, step: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
        """The contiguous share of `global_batch` that belongs to one rank, equally many for each."""
        share = self.batch_size // world_size
        return self.global_batch(step)[rank * share : (rank + 1) * share]

    def shards_ahead(self, step: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
        """The shards that a rank reads from `step` to the end of the block that follows it, in the order of need."""
        if not self.windowed or self.shards is None:
            return np.zeros(0, np.int64)
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.lanes
        first = position * share // self.block * self.block
        share_of_rank = self.batch_size // world_size
        lanes = slice(rank * share_of_rank // share, max(1, -(-(rank + 1) * share_of_rank // share)))
        parts = []
        for begin in (first, first + self.block):
            shards = self.shards[self._lanes_of(epoch)[lanes, begin : begin + self.block].reshape(-1)]
            parts.append(np.unique(shards))
        both = np.concatenate(parts)
        _, place = np.unique(both, return_index=True)
        return both[np.sort(place)].astype(np.int64)

    @property
    def block_steps(self) -> int:
        """Steps that one block of shuffled clips lasts."""
        return max(1, self.block * self.lanes // self.batch_size) if self.windowed else self.steps_per_epoch

    def _lanes_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64[lanes, clips of each] in the order they are taken."""
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            if self.windowed and self.shards is not None:
                order = self._windowed_order(draw, self.shards[self.clips])
            else:
                order = np.resize(permuted := draw.permutation(self.clips), max(len(permuted), self.batch_size))[None]
            self._epoch, self._order = epoch, order
        return self._order

    def _windowed_order(self, draw: np.random.Generator, shards: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        ids, number = np.unique(shards, return_inverse=True)
        order = self.clips[np.argsort(draw.permutation(len(ids))[number], kind="stable")]
        # what an epoch leaves out changes from epoch to epoch, as it does in a permutation
        used = self.steps_per_epoch * self.batch_size
        lanes = np.roll(order, int(draw.integers(len(order))))[:used].reshape(self.lanes, -1)
        for lane in lanes:
            for begin in range(0, lanes.shape[1], self.block):
                draw.shuffle(lane[begin : begin + self.block])
        return lanes
