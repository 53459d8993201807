"""Shards together find what one index finds: in this process, whatever the number of shards, and by Ray actors."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_sets import clusters, make_release, make_set

from audiomae.search.index import Quantiser
from audiomae.search.searcher import Searcher
from audiomae.search.sharded import Shard, ShardedSearcher
from audiomae.search.spec import IndexSpec

DIM = 16
Opened = tuple[list[Path], Path | None, IndexSpec]


@pytest.fixture(scope="module", params=["flat", "ivf"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A release of four segments."""
    folder = tmp_path_factory.mktemp(request.param)
    kind: dict[str, Any] = {"flat_max_rows": 100} if request.param == "ivf" else {}
    made = make_release(folder / "index", [make_set(folder / "0", clusters(1200, DIM))], **kind)
    for number in range(1, 4):
        names = [f"{number}-{row}" for row in range(200)]
        more = make_set(folder / str(number), clusters(200, DIM, seed=number), names=names)
        made = make_release(folder / "index", [more], **kind | {"fan_in": 9})
    assert made is not None and len(made.info["segments"]) == 4
    quantiser = made.info["quantiser"]
    spec = IndexSpec(**made.info["spec"]).model_copy(update={"nprobe": 6, "refine": 8})
    folders = [folder / "index" / segment["name"] for segment in made.info["segments"]]
    return folders, folder / "index" / quantiser if quantiser else None, spec


def split(folders: list[Path], counts: list[int]) -> list[tuple[list[Path], int]]:
    """Consecutive segments, so many to a shard, with the first row of each."""
    rows = [len(np.load(folder / "ids.npy")) for folder in folders]
    starts = np.cumsum([0, *counts])
    return [(folders[a:b], sum(rows[:a])) for a, b in zip(starts, starts[1:], strict=False)]  # noqa: RUF007


@pytest.mark.parametrize("counts", [[4], [1, 3], [2, 1, 1], [1, 1, 1, 1]])
def test_shards_find_what_one_index_finds(opened: Opened, counts: list[int]) -> None:
    folders, trained, spec = opened
    queries = clusters(20, DIM, seed=9)
    one = Searcher.open(folders, trained, spec).search(queries, 10)
    shards = [Shard.open(mine, trained, spec, start).search for mine, start in split(folders, counts)]
    whole = ShardedSearcher(shards, spec, Quantiser(trained) if trained else None)
    scores, rows = whole.search(queries, 10)
    np.testing.assert_allclose(scores[:, 0], one[0][:, 0], atol=1e-6)
    same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, one[1], strict=True)])
    assert same >= 0.99  # a shard rescores as many candidates as one index does, so it can only find more


class RemoteShard:
    """What a node that serves a shard does."""

    def __init__(self, *args: Any) -> None:
        self._shard = Shard.open(*args)

    def search(self, *args: Any) -> Any:
        return self._shard.search(*args)


def test_shards_in_ray_actors(opened: Opened, ray_cluster: None) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have the tests on their path
    folders, trained, spec = opened
    queries = clusters(20, DIM, seed=9)
    local = [Shard.open(mine, trained, spec, start).search for mine, start in split(folders, [2, 2])]
    actor = ray.remote(RemoteShard).options(num_cpus=0.1)
    remote = [actor.remote(mine, trained, spec, start) for mine, start in split(folders, [2, 2])]

    def call(handle: Any) -> Any:
        return lambda queries, k, nearest: ray.get(handle.search.remote(queries, k, nearest))

    quantiser = Quantiser(trained) if trained else None
    far = ShardedSearcher([call(handle) for handle in remote], spec, quantiser).search(queries, 10)
    near = ShardedSearcher(local, spec, quantiser).search(queries, 10)
    np.testing.assert_array_equal(far[1], near[1])
