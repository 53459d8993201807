"""The feature cache, the split, and batches that depend on the step number alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomae import storage
from audiomae.artifacts import features, receipts
from audiomae.artifacts.features import FeatureStore, Segment
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.errors import ConfigError, IntegrityError
from audiomae.training import clips
from audiomae.training.data import Loader
from audiomae.training.recipe import DataConfig
from audiomae.training.sampling import Sampler

BANDS = 6


def clip_features(uri: str, frames: int) -> np.ndarray:
    return np.random.default_rng(len(uri) * 1000 + frames).normal(size=(frames, BANDS)).astype(np.float32)


def extract(uri: str):
    if "bad" in uri:
        raise ValueError("no audio in it")
    if "nan" in uri:
        return [Segment(0.0, 1.0, np.full((4, BANDS), np.nan, np.float32))]
    lengths = [30, 20] if "long" in uri else [int(uri[-1]) + 1]
    return [Segment(float(i), float(i + 1), clip_features(uri, n)) for i, n in enumerate(lengths)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    features.write_shard(str(tmp_path), 0, ["a/long0", "a/bad", "b/7"], extract)
    features.write_shard(str(tmp_path), 1, ["b/nan", "c/3"], extract)
    return tmp_path


def test_clips_come_back_with_their_features_and_failures_as_rows(cache):
    clips = features.read_clips(str(cache), 2)
    good = clips.filter(pa.compute.is_null(clips["error"]))
    assert good["uri"].to_pylist() == ["a/long0", "a/long0", "b/7", "c/3"]
    assert good["frames"].to_pylist() == [30, 20, 8, 4] and good["shard"].to_pylist() == [0, 0, 0, 1]
    store = FeatureStore(ShardCache(str(cache), 1.0), good["shard"], good["first_frame"], good["frames"])
    for row, (uri, frames) in enumerate([("a/long0", 30), ("a/long0", 20), ("b/7", 8), ("c/3", 4)]):
        out = np.empty((frames, BANDS), np.float16)
        store.read(row, 0, frames, out)
        np.testing.assert_array_equal(out, clip_features(uri, frames).astype(np.float16))
    errors = {row["uri"]: row["error"] for row in clips.to_pylist() if row["error"]}
    assert errors == {"a/bad": "ValueError: no audio in it", "b/nan": "ValueError: the features are not finite"}


def test_only_shards_with_a_receipt_count(cache):
    assert features.pending_shards(str(cache), 3) == [2]
    (cache / "shard-00001.json").unlink()
    assert features.pending_shards(str(cache), 2) == [1]
    with pytest.raises(IntegrityError, match="shard-00001 has no receipt"):
        features.read_clips(str(cache), 2)


def test_infinities_put_into_cached_features_are_refused_by_name(cache):
    array = np.load(cache / "shard-00000.npy", mmap_mode="r+")
    array.reshape(-1)[:2000] = np.inf
    array.flush()
    with pytest.raises(IntegrityError, match=r"shard-00000\.npy: damaged: got sha256 .*: delete the shard's receipt"):
        ShardCache(str(cache)).get(0)
    ShardCache(str(cache)).get(1)  # what is not read need not be whole


def test_a_damaged_table_or_receipt_is_refused(cache):
    for name in ("shard-00001.parquet", "shard-00001.json"):
        whole = (cache / name).read_bytes()
        (cache / name).write_bytes(whole[:-8])
        with pytest.raises(IntegrityError, match=rf"{name}: damaged"):
            features.read_clips(str(cache), 2)
        (cache / name).write_bytes(whole)
    features.read_clips(str(cache), 2)


def test_caches_of_older_versions_stay_readable(cache):
    for index in (0, 1):
        path = cache / f"shard-{index:05d}.json"
        npy, table = (receipts.entry_of_file(path.with_suffix(suffix)) for suffix in (".npy", ".parquet"))
        old = {"features_sha256": npy.sha256, "features_bytes": npy.bytes, "clips_sha256": table.sha256, "clips": 3}
        storage.write_json(path, old)
    clips = features.read_clips(str(cache), 2)
    good = clips.filter(pa.compute.is_null(clips["error"]))
    assert len(FeatureStore(ShardCache(str(cache)), good["shard"], good["first_frame"], good["frames"])) == 4


def test_a_second_writer_of_other_bytes_is_told(cache):
    def louder(uri):
        return [Segment(0.0, 1.0, np.ones((4, BANDS)))]

    with pytest.raises(IntegrityError, match=r"shard-00001\.(npy|parquet): damaged"):
        features.write_shard(str(cache), 1, ["b/nan", "c/3"], louder)


def listing(**columns) -> pa.Table:
    count = len(next(iter(columns.values())))
    base = {"size": [10] * count, "content_id": ["x"] * count}
    return pa.table({**{k: columns[k] for k in ("uri",)}, **base, **{k: v for k, v in columns.items() if k != "uri"}})


def test_the_cache_is_named_by_content_and_recipe():
    files = listing(uri=["a", "b"])
    key = features.cache_key(files, {"clip_s": 10})
    assert key == features.cache_key(files.take([1, 0]), {"clip_s": 10})
    assert key != features.cache_key(files, {"clip_s": 5})
    assert key != features.cache_key(files.set_column(2, "content_id", pa.array(["x", "y"])), {"clip_s": 10})


def test_a_short_clip_is_repeated(cache):
    clips = features.read_clips(str(cache), 2)
    good = clips.filter(pa.compute.is_null(clips["error"]))
    store = FeatureStore(ShardCache(str(cache), 1.0), good["shard"], good["first_frame"], good["frames"])
    out = np.empty((10, BANDS), np.float16)
    store.read(3, 0, 10, out)
    expected = clip_features("c/3", 4).astype(np.float16)
    np.testing.assert_array_equal(out, np.concatenate([expected, expected, expected[:2]]))
    assert store.bands == BANDS and len(store) == 4


def test_every_epoch_is_a_new_permutation_that_all_ranks_share():
    sampler = Sampler(np.arange(100, 123), batch_size=8, seed=3)
    assert sampler.steps_per_epoch == 2
    epochs = [np.concatenate([sampler.global_batch(2 * e), sampler.global_batch(2 * e + 1)]) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 16 and set(epoch.tolist()) <= set(range(100, 123))
    assert not np.array_equal(epochs[0], epochs[1])
    again = Sampler(np.arange(100, 123), batch_size=8, seed=3)
    np.testing.assert_array_equal(again.global_batch(5), sampler.global_batch(5))
    shares = [again.local_batch(5, rank, 2) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(shares), sampler.global_batch(5))
    assert not np.array_equal(Sampler(np.arange(100, 123), 8, 4).global_batch(5), sampler.global_batch(5))


def test_fewer_clips_than_a_batch_are_repeated():
    sampler = Sampler(np.arange(3), batch_size=8, seed=0)
    assert sampler.steps_per_epoch == 1 and sorted(np.bincount(sampler.global_batch(0)).tolist()) == [2, 3, 3]


@pytest.fixture
def loader(cache) -> Loader:
    clips = features.read_clips(str(cache), 2)
    good = clips.filter(pa.compute.is_null(clips["error"]))
    store = FeatureStore(ShardCache(str(cache), 1.0), good["shard"], good["first_frame"], good["frames"])
    return Loader(store, Sampler(np.arange(4), 2, seed=0), frames=10, crops=[10, 10], rank=0, world_size=1)


def test_batches_do_not_depend_on_where_reading_began(loader):
    whole = list(loader.batches(0, 8))
    resumed = list(loader.batches(5, 8))
    assert [batch.step for batch in resumed] == [5, 6, 7]
    for first, again in zip(whole[5:], resumed, strict=True):
        np.testing.assert_array_equal(first.clips, again.clips)
        np.testing.assert_array_equal(first.features, again.features)
    assert whole[0].features.shape == (2, 2, 10, BANDS)
    assert not np.array_equal(whole[0].features[0], whole[0].features[1])


def test_a_short_crop_is_repeated_to_fill_its_view(loader):
    loader.crops = np.array([10, 4])
    features = loader.read(0).features
    np.testing.assert_array_equal(features[1, :, 4:8], features[1, :, :4])
    np.testing.assert_array_equal(features[1, :, 8:], features[1, :, :2])
    assert not np.array_equal(features[0, :, 4:8], features[0, :, :4])


def test_a_reader_that_is_left_early_stops_its_thread(loader):
    import threading

    batches = loader.batches(0, 1000)
    next(batches)
    batches.close()
    assert "feature-reader" not in {thread.name for thread in threading.enumerate()}


def test_an_error_while_reading_reaches_the_training_thread(loader):
    loader.store.frames = loader.store.frames[:1]
    with pytest.raises(IndexError):
        list(loader.batches(0, 8))


def clips_of(uris: list[str]) -> pa.Table:
    rows = [{"uri": u, "start_s": 0.0, "end_s": 1.0, "first_frame": 10 * i, "frames": 10} for i, u in enumerate(uris)]
    return pa.Table.from_pylist(rows, features.CLIP_SCHEMA).append_column(
        "shard", pa.array([0] * len(uris), pa.int32())
    )


URIS = [f"{label}/{i:02d}" for label in ("cat", "dog") for i in range(20)]
LISTING = listing(
    uri=URIS, label=[u[:3] for u in URIS], fold=[i % 5 + 1 for i in range(40)], caption=["a meow", *[None] * 39]
)


def test_the_split_takes_the_same_share_of_every_class_and_is_stable():
    table = clips.build_items(clips_of(URIS), LISTING, DataConfig(val_fraction=0.2), seed=0)
    held = {row["uri"] for row in table.to_pylist() if row["validation"]}
    assert sum(u.startswith("cat") for u in held) == 4 and sum(u.startswith("dog") for u in held) == 4
    fewer = LISTING.filter(pa.array([u != "dog/07" for u in URIS]))
    again = clips.build_items(clips_of(URIS), fewer, DataConfig(val_fraction=0.2), seed=0)
    assert len(held ^ {row["uri"] for row in again.to_pylist() if row["validation"]}) <= 2
    other = clips.build_items(clips_of(URIS), LISTING, DataConfig(val_fraction=0.2), seed=1)
    assert held != {row["uri"] for row in other.to_pylist() if row["validation"]}


def test_an_excluded_fold_is_neither_trained_on_nor_validated_on():
    table = clips.build_items(clips_of(URIS), LISTING, DataConfig(exclude={"fold": [1]}, val_fraction=0.25), seed=0)
    fold = dict(zip(URIS, LISTING["fold"].to_pylist(), strict=True))
    assert {fold[uri] for uri in table["uri"].to_pylist()} == {2, 3, 4, 5} and len(table) == 32
    assert sum(table["validation"].to_pylist()) == 8


def test_a_fold_can_be_the_validation_set():
    table = clips.build_items(
        clips_of(URIS), LISTING, DataConfig(exclude={"fold": 1}, val_filter={"fold": "2"}), seed=0
    )
    fold = dict(zip(URIS, LISTING["fold"].to_pylist(), strict=True))
    assert {fold[row["uri"]] for row in table.to_pylist() if row["validation"]} == {2}


def test_captions_come_from_the_listing_or_from_the_label():
    table = clips.build_items(clips_of(URIS), LISTING, DataConfig(), seed=0)
    captions = dict(zip(table["uri"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert captions["cat/00"] == "a meow" and captions["dog/00"] == "the sound of dog"
    bare = clips.build_items(clips_of(URIS), LISTING.select(["uri", "size", "content_id"]), DataConfig(), seed=0)
    assert bare["caption"].null_count == bare["label"].null_count == 40


def test_a_caption_that_reads_like_one_made_of_a_label_is_the_same_caption():
    given = listing(uri=URIS, label=[u[:3] for u in URIS], caption=["the sound of dog", *[None] * 39])
    table = clips.build_items(clips_of(URIS), given, DataConfig(), seed=0)
    names, numbers = clips.numbered(table["caption"])
    assert names.to_pylist() == ["the sound of cat", "the sound of dog"]
    assert numbers.tolist() == [1, *[0] * 19, *[1] * 20]
    some = clips.build_items(clips_of(URIS), given, DataConfig(label="nothing_such"), seed=0)
    assert some["caption"].to_pylist() == ["the sound of dog", *[None] * 39]


def test_a_class_whose_files_are_gone_is_no_class():
    table = clips.build_items(clips_of(URIS[20:]), LISTING, DataConfig(), seed=0)
    assert clips.numbered(table["label"])[0].to_pylist() == ["dog"] and len(table) == 20


def test_a_table_of_many_clips_is_not_copied_and_texts_are_numbers():
    given = clips_of(URIS)
    table = clips.build_items(given, LISTING, DataConfig(), seed=0)
    for name in given.column_names:
        if name != "error":
            (part,) = [chunk for chunk in table[name].chunks if len(chunk)]
            assert part.buffers()[-1].address == given[name].chunk(0).buffers()[-1].address, name
    assert pa.types.is_dictionary(table["label"].type) and pa.types.is_dictionary(table["caption"].type)


def test_items_are_the_same_after_a_file_and_with_texts_as_older_versions_wrote_them(tmp_path):
    table = clips.build_items(clips_of(URIS), LISTING, DataConfig(), seed=0)
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=7)
    again = pq.read_table(tmp_path / "items.parquet")
    assert clips.same_items(again, table)
    texts = {name: pa.array(table[name].to_pylist(), pa.string()) for name in ("label", "caption")}
    older = pa.table({name: texts.get(name, table[name]) for name in table.column_names})
    assert clips.same_items(older, table) and not older.equals(table)
    other = clips.build_items(clips_of(URIS), LISTING, DataConfig(), seed=1)
    assert not clips.same_items(other, table) and not clips.same_items(table.slice(1), table)
    renamed = listing(uri=URIS, label=[{"cat": "cow"}.get(u[:3], u[:3]) for u in URIS])
    assert not clips.same_items(clips.build_items(clips_of(URIS), renamed, DataConfig(), seed=0), table)


def test_an_unknown_column_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match=r"data.exclude: the corpus has no column 'folds'; did you mean 'fold'"):
        clips.build_items(clips_of(URIS), LISTING, DataConfig(exclude={"folds": [1]}), seed=0)


def test_numbered_labels_are_sorted_and_missing_ones_are_minus_one():
    names, numbers = clips.numbered(["b", None, "a", "b"])
    assert names.to_pylist() == ["a", "b"] and numbers.tolist() == [1, -1, 0, 1]
