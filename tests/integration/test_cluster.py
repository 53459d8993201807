"""Questions about the cluster, asked of a real one."""

import ray

from ray_jobs import _cluster
from ray_jobs._cluster import NodeRequest


def test_a_cluster_that_this_process_shut_down_before_makes_no_difference(ray_cluster: None) -> None:
    ray.experimental.internal_kv._internal_kv_reset()  # as the end of a `ray.cluster_utils.Cluster` leaves it
    assert (_cluster.room_for(NodeRequest({"CPU": 1.0})) or 0) >= 2
    assert not _cluster.offers(NodeRequest({"no_such_thing": 1.0}))
