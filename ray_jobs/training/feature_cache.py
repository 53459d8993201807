"""The feature cache of a training run, made by a Ray Data job: every file decoded once, in parallel, resumable."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from audiomae.artifacts.features import cache_key, pending_shards, read_clips, verify_features, write_shard
from audiomae.cli import Progress
from audiomae.corpus.manifest import list_corpus
from audiomae.errors import UserError
from audiomae.model.features import FeatureConfig
from audiomae.storage import to_path, write_json
from audiomae.training.extract import Extractor, cache_recipe
from audiomae.training.items import matches
from audiomae.training.recipe import DataConfig
from ray_jobs._ray import quiet_data_context

FILES_PER_SHARD, MOST_SHARDS = 32, 4096
MAX_REASONS = 5


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
    recipe = cache_recipe(features, clip_s)
    path = to_path(where) / cache_key(listing, recipe)
    uris = listing["uri"].to_pylist()
    size = max(FILES_PER_SHARD, -(-len(uris) // MOST_SHARDS))
    shards = [uris[start : start + size] for start in range(0, len(uris), size)]
    todo = pending_shards(str(path), len(shards))
    if todo:
        write_json(path / "recipe.json", recipe | {"corpus": root, "files": len(uris)})
        with Progress("decoding", len(uris), "files") as progress:
            progress.done = sum(len(uris) for index, uris in enumerate(shards) if index not in set(todo))
            for count in _extract(str(path), [(index, shards[index]) for index in todo], root, features, clip_s):
                progress.update(count)
    verify_features(path, set(range(len(shards))) - set(todo))
    clips = read_clips(str(path), len(shards))
    failed = clips.filter(pc.is_valid(clips["error"]))
    for row in failed.slice(0, MAX_REASONS).to_pylist():
        print(f"not decoded: {row['uri']}: {row['error']}")
    if len(failed) > MAX_REASONS:
        print(f"not decoded: {len(failed) - MAX_REASONS} more, see the `error` column in {path}")
    if len(failed) == len(clips):
        raise UserError(f"not one of {len(uris)} files in {root} could be decoded; see the reasons above")
    return str(path), clips


def _extract(
    cache: str, shards: list[tuple[int, list[str]]], root: str, features: FeatureConfig, clip_s: float
) -> Iterator[int]:
    """Run the pending shards as Ray Data tasks; yields the number of files of each finished shard."""
    import ray

    quiet_data_context()
    settings = features.model_dump(mode="json")

    def extract(row: dict) -> dict:
        extractor = Extractor(root, FeatureConfig(**settings), clip_s)
        write_shard(cache, int(row["index"]), list(row["uris"]), extractor)
        return {"files": len(row["uris"])}

    rows = [{"index": index, "uris": uris} for index, uris in shards]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(extract)
    for row in dataset.iter_rows():
        yield int(row["files"])
