"""Questions about the cluster, asked of a real one."""

import time

import pytest
import ray
from ray.core.generated import autoscaler_pb2

from ray_jobs import _cluster
from ray_jobs._cluster import NodeRequest

DEADLINE_S = 240  # a guard against hanging, no measure of speed


@ray.remote(num_cpus=1)
class Gate:
    """Holds its CPU until it is killed."""

    def ready(self) -> None:
        """Answers once it runs."""


def demand() -> int:
    """For how many CPUs something waits, as an autoscaler sees it."""
    reply = autoscaler_pb2.GetClusterStatusReply()
    reply.ParseFromString(_cluster._gcs_client().get_cluster_status())
    requests = reply.cluster_resource_state.pending_resource_requests
    return sum(item.count for item in requests if dict(item.request.resources_bundle) == {"CPU": 1.0})


def test_a_demand_outlives_what_was_free_before_the_work_began(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cluster, "ASK_AGAIN_S", 0.2)
    room = int(ray.cluster_resources()["CPU"])
    with _cluster.hint(NodeRequest({"CPU": 1.0}), room + 2):
        until = time.monotonic() + DEADLINE_S
        while ray.available_resources().get("CPU", 0) < room or demand():  # all of it has found room
            assert time.monotonic() < until
            time.sleep(0.1)
        gates = [Gate.remote() for _ in range(room)]
        try:
            ray.get([gate.ready.remote() for gate in gates], timeout=DEADLINE_S)
            while not demand():
                assert time.monotonic() < until, "nothing asks for more CPUs"
                time.sleep(0.1)
        finally:
            for gate in gates:
                ray.kill(gate)
    while demand():
        assert time.monotonic() < until, "the demand outlives the job"
        time.sleep(0.1)


def test_a_cluster_that_this_process_shut_down_before_makes_no_difference(ray_cluster: None) -> None:
    ray.experimental.internal_kv._internal_kv_reset()  # as the end of a `ray.cluster_utils.Cluster` leaves it
    assert (_cluster.room_for(NodeRequest({"CPU": 1.0})) or 0) >= 2
    assert not _cluster.offers(NodeRequest({"no_such_thing": 1.0}))
