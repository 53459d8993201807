"""A cluster that really autoscales, on one machine: Ray's own autoscaler with its provider of pretended nodes.

`ray.cluster_utils.AutoscalingCluster` does the same, but begins and ends with `ray stop --force`, which stops every Ray
of the machine, and reads a file that the wheels lack.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

from serve.proxy import free_ports
from tests.processes import kill_family

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 128 * 1024**2
HEAD_TYPE = "ray.head.default"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
START_S = 240.0


def cluster_config(node_types: Mapping[str, Mapping[str, Any]], idle_minutes: float, address: str) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads: a head without CPUs and these node types."""
    types: dict[str, Any] = {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    for name, spec in node_types.items():
        resources = {"object_store_memory": MEMORY, **spec["resources"]}
        types[name] = {"min_workers": 0, "node_config": {}, **spec, "resources": resources}
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "pretended",
        "max_workers": sum(spec["max_workers"] for spec in node_types.values()),
        "provider": {
            "type": "external",  # "fake_multinode" is the same, but reads a file that the wheels lack
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "available_node_types": types,
        "head_node_type": HEAD_TYPE,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "auth": {},
        "docker": {},
        **{f"{name}_commands": [] for name in empty},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@contextmanager
def autoscaling_cluster(
    node_types: Mapping[str, Mapping[str, Any]], idle_minutes: float = 0.2, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The address of a cluster with a head of 0 CPUs whose autoscaler may start nodes of these types.

    Args:
        node_types: name -> `resources` and `max_workers`, as in cluster.yaml.
        idle_minutes: after which an idle node is stopped.
        environment: of the cluster's processes.
    """
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        config, log = Path(folder) / "cluster.json", Path(folder) / "head.log"
        port, dashboard_port = free_ports(2)
        address = f"{get_node_ip_address()}:{port}"
        config.write_text(json.dumps(cluster_config(node_types, idle_minutes, address)))
        own = {
            "PYTHONPATH": str(ROOT),
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_raylet_start_wait_time_s": "180",  # of a busy machine
            "RAY_agent_register_timeout_ms": "180000",
            **(environment or {}),
        }
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0"]
        command += [
            f"--port={port}",
            "--include-dashboard=false",
            f"--dashboard-port={dashboard_port}",
            f"--object-store-memory={MEMORY}",
        ]
        command += [f"--autoscaling-config={config}", f"--temp-dir={folder}/ray"]
        with log.open("wb") as file:
            head = subprocess.Popen(command, env={**os.environ, **own}, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait_for("started", log, head)
            yield address
        finally:
            kill_family(head)


def _wait_for(text: str, log: Path, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while text not in log.read_text(errors="replace"):
        if head.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the head did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)
