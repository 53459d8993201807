"""Training from a cache that does not fit: the order, what each node fetches, and that damage is noticed."""

import fcntl
from pathlib import Path

import numpy as np
import pytest

from audiomae.artifacts.features import FeatureStore, Segment, read_clips, write_shard
from audiomae.artifacts.shard_cache import GIB, ShardCache
from audiomae.errors import IntegrityError, UserError
from audiomae.storage import to_path
from audiomae.training.data import Loader, cache_caution
from audiomae.training.sampling import Sampler
from ray_jobs.training.feature_cache import shard_starts

SHARDS, CLIPS, FRAMES, BANDS = 40, 12, 20, 8


def segments(uri: str) -> list[Segment]:
    draw = np.random.default_rng(int(uri))
    return [Segment(0.0, 1.0, draw.random((FRAMES, BANDS), np.float32))]


@pytest.fixture(scope="module")
def remote(s3_server: str) -> str:
    """A feature cache on S3: 40 shards of 12 clips."""
    import boto3

    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="streaming")
    for shard in range(SHARDS):
        uris = [str(shard * CLIPS + clip) for clip in range(CLIPS)]
        assert write_shard("s3://streaming/cache", shard, uris, segments) == 0
    return "s3://streaming/cache"


def sampler(batch: int = 16, seed: int = 0, shuffle_shards: int = 8, shards: int = SHARDS) -> Sampler:
    return Sampler(np.arange(shards * CLIPS), batch, seed, np.repeat(np.arange(shards), CLIPS), shuffle_shards)


def test_every_clip_is_used_once_an_epoch_in_another_order_each_time() -> None:
    order = sampler()
    steps = order.steps_per_epoch
    epochs = [np.concatenate([order.global_batch(epoch * steps + step) for step in range(steps)]) for epoch in range(3)]
    assert all(len(np.unique(epoch)) == len(epoch) == SHARDS * CLIPS for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(epochs[1][:16], sampler().global_batch(steps))  # after a restart
    assert not np.array_equal(sampler(seed=1).global_batch(0), epochs[0][:16])


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    order = sampler()
    for step in (0, 7, order.steps_per_epoch + 3):
        whole = order.global_batch(step)
        for workers in (1, 2, 4):
            shares = [sampler().local_batch(step, rank, workers) for rank in range(workers)]
            assert np.array_equal(np.concatenate(shares), whole)


def test_few_shards_are_shuffled_as_a_whole() -> None:
    plain = Sampler(np.arange(96), 16, 3)
    assert all(np.array_equal(plain.global_batch(s), sampler(16, 3, 8, 8).global_batch(s)) for s in range(9))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_small_disk_is_enough_and_each_node_fetches_its_share(remote: str, tmp_path: Path, workers: int) -> None:
    clips = read_clips(remote, SHARDS)
    shard_bytes = int(to_path(remote + "/shard-00000.npy").stat().st_size)
    order = sampler(shuffle_shards=4)
    fetched, seen = 0, []
    for rank in range(workers):
        # a tenth of the cache, for each node its own
        limit = max(4, SHARDS // 10 + 2) * 2 * shard_bytes if workers == 1 else 6 * shard_bytes
        cache = ShardCache(remote, limit / GIB, tmp_path / str(rank))
        store = FeatureStore(cache, clips["shard"], clips["first_frame"], clips["frames"])
        loader = Loader(store, order, FRAMES, [FRAMES], rank, workers)
        for batch in loader.batches(0, order.steps_per_epoch):
            for row, clip in enumerate(batch.clips):
                assert np.array_equal(batch.features[0, row], segments(str(clip))[0].features.astype(np.float16))
            seen += batch.clips.tolist()
        cache.close()
        on_disk = sum(path.stat().st_size for path in (tmp_path / str(rank)).glob("*.npy"))
        assert on_disk <= limit
        fetched = max(fetched, cache.fetched_bytes)
    assert sorted(seen) == list(range(SHARDS * CLIPS))
    # each lane's ends may lie inside a shard, so that two lanes need it
    assert fetched <= 1.2 * SHARDS * shard_bytes / workers + 3 * shard_bytes


def test_a_shard_takes_its_place_only_while_nobody_counts(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, renamed = Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        with (tmp_path / "room.lock").open("ab") as room, pytest.raises(BlockingIOError):
            fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
        renamed.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    ShardCache(remote, 1.0, tmp_path).get(3)
    assert renamed == ["shard-00003.npy"]


def test_what_a_killed_process_left_half_way_goes(remote: str, tmp_path: Path) -> None:
    shard_bytes = int(to_path(remote + "/shard-00000.npy").stat().st_size)
    left = ["shard-00005.npy.coming", ".shard-00005.npy.coming.0a1b.tmp"]
    coming = ["shard-00006.npy.coming", ".shard-00006.npy.coming.2c3d.tmp"]
    for name in left + coming:
        (tmp_path / name).write_bytes(bytes(shard_bytes))
    with (tmp_path / "shard-00006.npy.lock").open("ab") as fetching:
        fcntl.flock(fetching, fcntl.LOCK_EX)
        cache = ShardCache(remote, 2 * shard_bytes / GIB, tmp_path)
        for shard in (0, 1):
            cache.get(shard)
        there = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert there == {"shard-00001.npy", *coming}  # room for one beside the one that another process fetches


def test_a_cache_too_small_for_what_is_read_at_a_time_is_said() -> None:
    shards, frames = np.repeat(np.arange(SHARDS), CLIPS), np.full(SHARDS * CLIPS, FRAMES)
    window = 4 * CLIPS * FRAMES * BANDS * 2 / GIB
    assert cache_caution(shards, frames, BANDS, 4, 2 * window) is None
    said = cache_caution(shards, frames, BANDS, 4, 1.9 * window)
    assert said is not None and "data.shuffle_shards 4" in said
    assert cache_caution(shards, frames, BANDS, 64, SHARDS / 4 * window) is None  # all of it fits


def test_bytes_that_are_not_those_of_the_receipt_are_refused(remote: str, tmp_path: Path) -> None:
    source = ShardCache(remote, 1.0, tmp_path / "first")
    (tmp_path / "first" / "shard-00003.npy").write_bytes(b"left here by a disk that was full")
    assert source.get(3).shape == (CLIPS * FRAMES, BANDS) and source.get(3) is source.get(3)
    write_shard("s3://streaming/damaged", 0, ["1", "2"], segments)
    path = to_path("s3://streaming/damaged/shard-00000.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"got sha256 .*, expected"):
        ShardCache("s3://streaming/damaged", 1.0, tmp_path / "second").get(0)
    assert not list((tmp_path / "second").glob("*.npy"))
    with pytest.raises(UserError, match=r"data\.cache_gib"):
        ShardCache(remote, 1 / GIB, tmp_path / "third").get(0)


def test_a_file_that_fails_half_way_leaves_nothing_of_itself(tmp_path: Path) -> None:
    def extract(uri: str) -> list[Segment]:
        bad = Segment(1.0, 2.0, np.full((2, BANDS), np.nan, np.float32))
        return [*segments(uri), bad] if uri == "2" else segments(uri)

    assert write_shard(str(tmp_path), 0, ["1", "2", "3"], extract) == 1
    clips = read_clips(str(tmp_path), 1)
    assert clips["uri"].to_pylist() == ["1", "2", "3"] and clips["frames"].to_pylist() == [FRAMES, None, FRAMES]
    features = np.load(tmp_path / "shard-00000.npy")
    assert features.shape == (2 * FRAMES, BANDS)
    assert np.array_equal(features[FRAMES:], segments("3")[0].features.astype(np.float16))


def test_shards_have_a_bounded_number_of_clips() -> None:
    small = shard_starts(np.full(400, 40_000), 10.0)
    assert len(small) == 13 and small[:2] == [0, 32]  # 32 files each
    many = shard_starts(np.full(1_000_000, 100_000), 10.0)
    assert set(np.diff(many)) == {512}
    long = shard_starts(np.full(100, 16_000 * 3600), 10.0)  # an hour each, 360 clips: 512 are passed in the second
    assert max(np.diff(long)) <= 2
    assert shard_starts(np.array([-1, -1]), 10.0) == [0]
