"""The feature cache of a training run, made by a Ray Data job: every file decoded once, in parallel, resumable."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.artifacts.features import cache_key, pending_shards, read_clips, verify_features, write_shard
from audiomae.cli import Progress
from audiomae.corpus.manifest import list_corpus
from audiomae.errors import UserError
from audiomae.model.encoder_config import FeatureConfig
from audiomae.storage import is_local, to_path, write_json
from audiomae.training.clips import matches
from audiomae.training.recipe import DataConfig
from ray_jobs._cluster import NodeRequest, hint, notice_of_waiting
from ray_jobs._ray import quiet_data_context

# about 128 MB where a clip lasts 10 s; a small corpus gets small shards, so that all CPUs have some
LEAST_CLIPS, MOST_CLIPS, SHARDS_OF_A_SMALL_CORPUS = 32, 512, 64
BYTES_PER_S = 16_000  # of audio files, compressed; plain PCM gives smaller shards
MAX_REASONS = 5
SHARDS_AT_ONCE = 4096  # given to Ray Data: the driver's memory for them stays bounded
MOST_ANNOUNCED = 256  # CPUs that an autoscaler is told of at once; Ray Data asks for more as it goes


def list_files(source: str, config: DataConfig) -> tuple[str, pa.Table]:
    """(corpus root, listing sorted by uri), after `data.filter`.

    Raises:
        UserError: no such corpus, nothing in it, or nothing left by the filter.
    """
    corpus = list_corpus(source)
    listing = pa.concat_tables(corpus.batches()).sort_by("uri").combine_chunks()
    for line in corpus.notes.lines():
        print(f"note: {line}")
    if config.filter:
        listing = listing.filter(pa.array(matches(listing, config.filter, "filter")))
        if len(listing) == 0:
            raise UserError(f"data.filter {config.filter}: no file of {source} matches")
    return corpus.root, listing


def build_cache(
    where: str, root: str, listing: pa.Table, features: FeatureConfig, clip_s: float
) -> tuple[str, pa.Table]:
    """Make (or finish, or find) the cache of these files; returns (its path, its rows with failures).

    Raises:
        UserError: not one file could be decoded.
    """
    from audiomae.training.extract import cache_recipe

    recipe = cache_recipe(features, clip_s)
    path = to_path(where) / cache_key(listing, recipe)
    starts = shard_starts(listing["size"].to_numpy(zero_copy_only=False), clip_s)
    ends = [*starts[1:], len(listing)]
    todo = pending_shards(str(path), len(starts))
    if todo:
        write_json(path / "recipe.json", recipe | {"corpus": root, "files": len(listing)})
        with Progress("decoding", len(listing), "files") as progress:
            progress.done = len(listing) - sum(ends[index] - starts[index] for index in todo)
            for begin in range(0, len(todo), SHARDS_AT_ONCE):
                shards = [
                    _files_of(index, listing["uri"].slice(starts[index], ends[index] - starts[index]))
                    for index in todo[begin : begin + SHARDS_AT_ONCE]
                ]
                for count in _extract(str(path), shards, root, features, clip_s):
                    progress.update(count)
    if is_local(path):  # those on S3 are checked by the nodes that fetch them
        verify_features(path, set(range(len(starts))) - set(todo))
    clips = read_clips(str(path), len(starts))
    failed = clips.filter(pc.is_valid(clips["error"]))
    for row in failed.slice(0, MAX_REASONS).to_pylist():
        print(f"not decoded: {row['uri']}: {row['error']}")
    if len(failed) > MAX_REASONS:
        print(f"not decoded: {len(failed) - MAX_REASONS} more, see the `error` column in {path}")
    if len(failed) == len(clips):
        raise UserError(f"not one of {len(listing)} files in {root} could be decoded; see the reasons above")
    return str(path), clips


def shard_starts(sizes: npt.NDArray[np.int64], clip_s: float) -> list[int]:
    """First file of each shard: files of about as many clips each, by their sizes in bytes (negative: unknown)."""
    clips = np.maximum(1, sizes / (clip_s * BYTES_PER_S))
    target = np.clip(clips.sum() / SHARDS_OF_A_SMALL_CORPUS, LEAST_CLIPS, MOST_CLIPS)
    shard = ((np.cumsum(clips) - clips) // target).astype(np.int64)
    return np.flatnonzero(np.diff(shard, prepend=-1)).tolist()


def _files_of(index: int, uris: pa.ChunkedArray) -> pa.Table:
    return pa.table({"index": [index], "uris": pa.ListArray.from_arrays([0, len(uris)], uris.combine_chunks())})


def _extract(cache: str, shards: list[pa.Table], root: str, features: FeatureConfig, clip_s: float) -> Iterator[int]:
    """Run these shards as Ray Data tasks, one each; yields the number of files of each that is finished."""
    import ray

    quiet_data_context()
    settings = features.model_dump(mode="json")

    def extract(row: dict) -> dict:
        from audiomae.training.extract import Extractor

        extractor = Extractor(root, FeatureConfig(**settings), clip_s)
        write_shard(cache, int(row["index"]), list(row["uris"]), extractor)
        return {"files": len(row["uris"])}

    dataset = ray.data.from_blocks(list(shards)).map(extract)
    one = NodeRequest({"CPU": 1})
    with notice_of_waiting(one, len(shards)), hint(one, min(len(shards), MOST_ANNOUNCED)):
        for row in dataset.iter_rows():
            yield int(row["files"])
