"""How an embedding job is laid out over a cluster: what decoding and encoding ask for, and of how many."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ray_jobs import _cluster
from ray_jobs._cluster import NodeRequest
from ray_jobs._placement import PlacementConfig

MOST_WORKERS = 1024  # of one job: each that waits for its node is an actor that waits
BESIDE_GPU = 0.0001  # CPUs, the least that Ray counts
DECODERS_ANNOUNCED = 8  # per GPU encoder, to an autoscaler that starts with nothing; Ray Data asks for more as it goes


@dataclass(frozen=True)
class Topology:
    """Where decoding and encoding happen.

    Attributes:
        kind: `fused` (one worker decodes and encodes) or `split` (decode tasks feed encoders).
        encode: what each encoder, or fused worker, asks of its node.
        encoders: the most of them. They wait for nodes that have room for them, so the pool grows as nodes join.
        decode: what each decode task asks for; `None` when fused.
    """

    kind: Literal["fused", "split"]
    encode: NodeRequest
    encoders: int
    decode: NodeRequest | None = None

    def describe(self) -> str:
        where = "GPU" if self.encode.resources.get("GPU") else "CPU"
        if self.decode is None:
            return f"up to {self.encoders:,} decode+encode workers on {where} ({self.encode.describe()} each)"
        return (
            f"decode tasks ({self.decode.describe()} each) for up to {self.encoders:,} encoders on {where} "
            f"({self.encode.describe()} each)"
        )


def choose_topology(config: PlacementConfig, shards: int) -> Topology:
    """Lay a job of so many shards out over the cluster that this driver is connected to."""
    shapes = [*_cluster.nodes(), *_cluster.node_types()]
    topology = lay_out(config, shards, shapes, gpus_per_encoder(config, _cluster.offers_gpus))
    if config.workers is not None:
        return topology
    # Ray Data looks at each waiting worker all the time: a thousand of them for two CPUs cost more than the work
    room = _cluster.room_for(topology.encode)
    return replace(topology, encoders=max(1, min(topology.encoders, room or MOST_WORKERS)))


def gpus_per_encoder(config: PlacementConfig, offers_gpus: Callable[[], bool]) -> float:
    """GPUs that each encoder reserves: as asked for, else 1 if there are any and `device` allows it."""
    if config.num_gpus_per_encoder is not None:
        return config.num_gpus_per_encoder
    if config.device.startswith("cpu"):
        return 0.0
    if config.accelerator_type or config.device.startswith("cuda"):
        return 1.0
    return 1.0 if offers_gpus() else 0.0


def lay_out(config: PlacementConfig, shards: int, shapes: Iterable[Mapping[str, float]], gpus: float) -> Topology:
    """The layout for nodes of these shapes (those there are and those that may come).

    Without a GPU `auto` is `fused`: one worker of one thread per CPU, measured best, since nothing is copied between
    processes and no core has two threads. With GPUs it is `split`. Ray prefers nodes without a GPU for the decode
    tasks, and the CPUs beside the GPUs when those are full.
    """
    shapes = list(shapes)
    kind = config.topology if config.topology != "auto" else ("split" if gpus else "fused")
    encoders = max(1, min(config.workers or MOST_WORKERS, shards))
    encode = {"CPU": _encoder_cpus(config, shapes, gpus, alone=kind == "fused"), "GPU": gpus}
    encode_request = NodeRequest({**encode, **config.encode_resources}, config.encode_labels, config.accelerator_type)
    if kind == "fused":
        return Topology("fused", encode_request, encoders)
    decode = {"CPU": _decoder_cpus(shapes, gpus), **config.decode_resources}
    if not gpus and config.workers is None:  # half of the CPUs: the other half feeds them
        cpus = sum(shape.get("CPU", 0) for shape in shapes)
        encoders = min(encoders, max(1, int(cpus // 2))) if cpus else encoders
    return Topology("split", encode_request, encoders, NodeRequest(decode, config.decode_labels))


def _encoder_cpus(config: PlacementConfig, shapes: list[Mapping[str, float]], gpus: float, alone: bool) -> float:
    """As many as it has threads, where its nodes have them.

    An encoder on a GPU that others feed takes a trifle: that keeps one CPU of its node free of decode tasks, and Ray
    Data, which counts waiting encoders as if they ran, does not take the decode tasks' CPUs for used.
    """
    hosts = [shape for shape in shapes if shape.get("GPU", 0) >= gpus] if gpus else shapes
    most = max((shape.get("CPU", 0) for shape in hosts), default=0) or float(config.threads)
    if gpus and not alone:
        return BESIDE_GPU if all(shape.get("CPU", 0) for shape in hosts) else 0.0
    if gpus:
        most = min((shape.get("CPU", 0) / shape["GPU"] * gpus for shape in hosts), default=most)
    elif not alone and sum(shape.get("CPU", 0) for shape in shapes) < 2:
        most = most / 2  # one CPU for both stages
    return _floor(min(config.threads, most))


def _decoder_cpus(shapes: list[Mapping[str, float]], gpus: float) -> float:
    """One, or a share of one where the encoders leave less than one on every node."""
    taken = BESIDE_GPU if gpus else 0.0
    largest = max((shape.get("CPU", 0) - (taken if shape.get("GPU") else 0) for shape in shapes), default=0)
    if not gpus and 0 < sum(shape.get("CPU", 0) for shape in shapes) < 2:
        return 0.25
    return 0.5 if 0 < largest < 1 else 1.0


def _floor(share: float) -> float:
    """Ray's resources have four decimals; rounding up could ask for more than there is."""
    return int(share * 1000) / 1000
