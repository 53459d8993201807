"""What a cluster has, what its autoscaler may add, and waiting for it.

Demand is declared in the way that every autoscaler of Ray sees and that ends with the job: tasks and actors that wait
for their resources. (`ray.autoscaler.sdk.request_resources` is all or nothing, outlives a killed driver, and is
overwritten by Ray Data and Ray Train, which use it themselves.)
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

NOTICE_AFTER_S, NOTICE_EVERY_S = 5.0, 60.0
AUTOSCALER_ANSWERS_S = 30.0
ASK_AGAIN_S = 2.0
HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class NodeRequest:
    """What one task or actor asks of the node it runs on.

    Attributes:
        resources: `CPU`, `GPU`, and custom ones.
        labels: Ray label selector, label -> value (or `!value`, `in(a,b)`, `!in(a,b)`).
        accelerator_type: kind of GPU, such as `L4`.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As options of a Ray task or actor."""
        custom = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        options: dict[str, Any] = {"num_cpus": self.resources.get("CPU", 0), "num_gpus": self.resources.get("GPU", 0)}
        if custom:
            options["resources"] = custom
        if self.labels:
            options["label_selector"] = dict(self.labels)
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        return options

    @property
    def amounts(self) -> dict[str, float]:
        """All resources, the kind of GPU included, as Ray's scheduler counts them."""
        kind = {f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {}
        return {name: amount for name, amount in {**self.resources, **kind}.items() if amount}

    def describe(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in self.amounts.items() if ":" not in name]
        parts += [f"a GPU of type {self.accelerator_type}"] if self.accelerator_type else []
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        return " + ".join(parts) or "nothing"

    def count_on(self, resources: Mapping[str, float]) -> int:
        """How many fit on a node with these resources. Labels are left to Ray."""
        if not self.amounts:
            return 1
        return min(int(resources.get(name, 0) / amount + 1e-9) for name, amount in self.amounts.items())


def nodes() -> list[dict[str, float]]:
    """Total resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_types() -> list[dict[str, float]]:
    """Resources of each kind of node that the autoscaler may start, where its config can be read."""
    return [resources for resources, _ in _node_types()]


def room_for(request: NodeRequest) -> int | None:
    """How many of these the cluster has room for, or may get room for; `None` where nobody can tell.

    Without an autoscaler nodes can only be added by hand: room for twice as many as now.
    """
    now = sum(request.count_on(node) for node in nodes())
    types = _node_types()
    if types:
        return now + sum(request.count_on(resources) * most for resources, most in types)
    return 2 * now if now and not _autoscaler_answers(_gcs_client()) else None


def _gcs_client() -> Any:
    """A client of our own: the one that Ray keeps for the process is gone once any cluster in it was shut down."""
    return ray._raylet.GcsClient(  # type: ignore[attr-defined]
        ray.get_runtime_context().gcs_address
    )


def _autoscaler_answers(client: Any) -> bool:
    """Whether the cluster has an autoscaler of the kind that can be asked (version 2)."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True, gcs_client=client))


def _node_types() -> list[tuple[dict[str, float], int]]:
    """(resources, most nodes) of each kind in the autoscaler's config.

    It is the file that `ray up` gives the head's autoscaler, and drivers run on the head. On Kubernetes the autoscaler
    runs in a container of its own, there `autoscaler_gives` asks it.
    """
    address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        given = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if given.get("--gcs-address") == address and "--autoscaling-config" in given:
            with contextlib.suppress(OSError, yaml.YAMLError):
                config = yaml.safe_load(Path(given["--autoscaling-config"]).expanduser().read_text())
                most = config.get("max_workers", 2)  # Ray's default
                types = config["available_node_types"].values()
                found = [(spec.get("resources", {}), min(spec.get("max_workers", most), most)) for spec in types]
                return [(resources, count) for resources, count in found if count]
    return []


def offers(request: NodeRequest) -> bool:
    """Whether the cluster has room for the request on some node, or its autoscaler would start one."""
    if any(request.count_on(node) for node in [*nodes(), *node_types()]):
        return True
    return bool(autoscaler_gives(request))


def offers_gpus() -> bool:
    """Whether the cluster has a GPU, or would start a node with one."""
    return offers(NodeRequest({"GPU": 0.01}))


def autoscaler_gives(request: NodeRequest) -> bool | None:
    """Whether the autoscaler would start a node for the request; `None` when there is none that answers.

    It is asked as anything is asked of it, by a task that waits for the resources. It says of each that waits whether
    any kind of node could run it.
    """
    from ray.core.generated import autoscaler_pb2 as messages

    client = _gcs_client()
    if not _autoscaler_answers(client):
        return None
    waiting = ray.remote(_nothing).options(**request.options, max_retries=0).remote()
    wanted, asked = request.amounts, None
    deadline = time.monotonic() + AUTOSCALER_ANSWERS_S
    try:
        while time.monotonic() < deadline:
            if ray.wait([waiting], timeout=0.5)[0]:
                return True
            reply: Any = messages.GetClusterStatusReply()  # type: ignore[attr-defined]
            reply.ParseFromString(client.get_cluster_status())
            pending = [item.request for item in reply.cluster_resource_state.pending_resource_requests]
            if asked is None and any(_same(item, wanted) for item in pending):
                asked = reply.cluster_resource_state.cluster_resource_state_version
            state = reply.autoscaling_state
            if asked is not None and state.last_seen_cluster_resource_state_version >= asked:
                return not any(_same(item, wanted) for item in state.infeasible_resource_requests)
        return None
    finally:
        ray.cancel(waiting, force=True)


def _same(item: Any, amounts: Mapping[str, float]) -> bool:
    return {name: round(amount, 4) for name, amount in item.resources_bundle.items()} == {
        name: round(amount, 4) for name, amount in amounts.items()
    }


def _nothing() -> None:
    """A task that only waits for its resources."""


@contextmanager
def hint(request: NodeRequest, count: int) -> Iterator[None]:
    """Let the autoscaler see a demand for `count` more of these, as tasks that wait while the block runs.

    Each ends as soon as there is room for it, so none takes anything from the work that it announces. What is free for
    a moment, before that work has begun, would so end the demand: as many as the cluster has room for are asked for
    again, until it has room for `count`.
    """
    task = ray.remote(_nothing).options(**request.options, max_retries=0)
    waiting = [task.remote() for _ in range(count)]
    stop = threading.Event()
    keeper = threading.Thread(target=_ask_again, args=(task, waiting, request, stop), name="demand", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        for reference in waiting:
            ray.cancel(reference, force=True)


def _ask_again(task: Any, waiting: list[Any], request: NodeRequest, stop: threading.Event) -> None:
    count = len(waiting)
    while waiting and not stop.wait(ASK_AGAIN_S):
        try:
            room = sum(request.count_on(node) for node in nodes())
            if room >= count:
                return
            waiting[:] = ray.wait(waiting, num_returns=len(waiting), timeout=0)[1]
            waiting += [task.remote() for _ in range(max(1, room) - len(waiting))]
        except Exception:  # the driver is being shut down
            return


@contextmanager
def notice_of_waiting(request: NodeRequest, most: int = 1) -> Iterator[None]:
    """While the block runs, say on stderr when no node of the cluster could run the request, and when one can."""
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(request, most, stop), name="waiting-for-nodes", daemon=True)
    watch.start()
    try:
        yield
    finally:
        stop.set()
        watch.join()


def _watch(request: NodeRequest, most: int, stop: threading.Event) -> None:
    began = time.monotonic()
    said = None
    while not stop.wait(0.5):
        now = time.monotonic()
        try:
            there = any(request.count_on(node) for node in nodes())
        except Exception:  # the driver is being shut down
            return
        if there and said is not None:
            print(f"a node with {request.describe()} joined after {now - began:.0f} s", file=sys.stderr, flush=True)
            said = None
        elif not there and (said is None or now - said > NOTICE_EVERY_S) and now - began > NOTICE_AFTER_S:
            said = now
            print(
                f"waiting for nodes: none of the cluster has {request.describe()}, up to {most:,} of them are asked "
                "for; an autoscaler starts nodes now if its node types have that (`ray status` on the head tells), "
                "otherwise add one with `ray start --address=...`",
                file=sys.stderr,
                flush=True,
            )


def cpus_now() -> float:
    """CPUs of all nodes that are alive."""
    return sum(node.get("CPU", 0) for node in nodes())
