"""What the workers of a training run ask of the cluster."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from audiomae.training.recipe import WorkersConfig
from ray_jobs import _cluster
from ray_jobs._cluster import NodeRequest

if TYPE_CHECKING:
    import torch
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig


def worker_request(
    workers: WorkersConfig, shapes: Iterable[Mapping[str, float]], offers_gpus: Callable[[], bool]
) -> NodeRequest:
    """What each worker asks for, in a cluster with (and with node types of) these shapes.

    With `gpu: auto` it is a GPU where the cluster has one or its autoscaler would start one: a GPU that is not up yet
    is waited for. CPUs are as many as asked for, less where the nodes that there are have not enough for all workers.
    """
    gpu = (bool(workers.accelerator_type) or offers_gpus()) if workers.gpu == "auto" else bool(workers.gpu)
    hosts = [shape for shape in shapes if shape.get("CPU", 0) and (shape.get("GPU", 0) >= 1 or not gpu)]
    cpus = float(workers.cpus)
    if hosts and gpu:
        cpus = min(cpus, min(shape["CPU"] / shape["GPU"] for shape in hosts))
    elif hosts:
        cpus = min(cpus, sum(shape["CPU"] for shape in hosts) / workers.range[0])
    resources = {"CPU": cpus, **({"GPU": 1.0} if gpu else {}), **workers.resources}
    return NodeRequest(resources, workers.labels, workers.accelerator_type)


def choose_workers(workers: WorkersConfig) -> NodeRequest:
    """`worker_request` for the cluster that this driver is connected to; says when it is not what was asked for."""
    request = worker_request(workers, [*_cluster.nodes(), *_cluster.node_types()], _cluster.offers_gpus)
    if request.resources["CPU"] < workers.cpus:
        print(f"the nodes have fewer than {workers.cpus:g} CPUs a worker: each reserves {request.resources['CPU']:g}")
    if workers.gpu == "auto" and "GPU" not in request.resources:
        print("the cluster has no GPU, and no autoscaler that would start one: training on the CPU")
    return request


def scaling(workers: WorkersConfig, request: NodeRequest) -> "ScalingConfig":
    """Ray Train's words for it."""
    from ray.train import ScalingConfig

    least, most = workers.range
    return ScalingConfig(
        num_workers=least if least == most else (least, most),  # type: ignore[arg-type]
        use_gpu="GPU" in request.resources,
        resources_per_worker=dict(request.resources),
        label_selector=dict(request.labels) or None,  # type: ignore[call-arg]  # typed as Train V1's
        accelerator_type=request.accelerator_type,
    )


def collectives() -> "TorchConfig":
    """NCCL where all workers compute on GPUs, gloo where one's torch sees none, whatever Ray reserved for them."""
    from ray_jobs.training.collectives import CollectivesByDevice

    return CollectivesByDevice()


def worker_device() -> "torch.device":
    """The GPU of this Ray Train worker, or the CPU where it has none or its torch sees none."""
    import ray.train.torch
    import torch

    return ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
