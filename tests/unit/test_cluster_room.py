"""How many workers a job waits for: what there is room for, or may come to be."""

import pytest

from ray_jobs import _cluster
from ray_jobs._cluster import NodeRequest
from ray_jobs._placement import PlacementConfig
from ray_jobs.embed import topology

ONE = NodeRequest({"CPU": 1.0})


def cluster(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    types: list[tuple[dict[str, float], int]] | None = None,
    autoscaler: bool = False,
) -> None:
    monkeypatch.setattr(_cluster, "nodes", lambda: nodes)
    monkeypatch.setattr(_cluster, "_node_types", lambda: types or [])
    monkeypatch.setattr(_cluster, "_gcs_client", lambda: None)
    monkeypatch.setattr(_cluster, "_autoscaler_answers", lambda client: autoscaler)


def test_room_is_what_there_is_and_what_the_autoscaler_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, [{"CPU": 2.0}, {"CPU": 4.0}])
    assert _cluster.room_for(ONE) == 12  # nodes added by hand find work
    cluster(monkeypatch, [{"CPU": 0.0}], [({"CPU": 4.0}, 10), ({"CPU": 8.0, "GPU": 1.0}, 2)])
    assert _cluster.room_for(ONE) == 56 and _cluster.room_for(NodeRequest({"GPU": 0.5})) == 4
    cluster(monkeypatch, [{"CPU": 2.0}], autoscaler=True)
    assert _cluster.room_for(ONE) is None  # nobody says what it may start
    cluster(monkeypatch, [{"CPU": 0.0}])
    assert _cluster.room_for(ONE) is None


@pytest.mark.parametrize(("workers", "shards", "encoders"), [(None, 500, 4), (None, 3, 3), (100, 500, 100)])
def test_a_pool_is_no_larger_than_the_room_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, shards: int, encoders: int
) -> None:
    cluster(monkeypatch, [{"CPU": 2.0}])
    config = PlacementConfig(workers=workers, num_gpus_per_encoder=0)
    assert topology.choose_topology(config, shards).encoders == encoders
