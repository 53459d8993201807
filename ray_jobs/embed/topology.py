"""How an embedding job is laid out over a cluster: what decoding and encoding ask for, and of how many."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ray_jobs import _cluster
from ray_jobs._cluster import Request
from ray_jobs._placement import PlacementConfig

MOST_WORKERS = 1024  # of one job: each that waits for its node is an actor that waits
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
    encode: Request
    encoders: int
    decode: Request | None = None

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
    return lay_out(config, shards, shapes, gpus_per_encoder(config, _cluster.offers_gpus))


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
    encode_request = Request({**encode, **config.encode_resources}, config.encode_labels, config.accelerator_type)
    if kind == "fused":
        return Topology("fused", encode_request, encoders)
    decode = {"CPU": _decoder_cpus(shapes, encode, gpus), **config.decode_resources}
    if not gpus and config.workers is None:  # half of the CPUs: the other half feeds them
        cpus = sum(shape.get("CPU", 0) for shape in shapes)
        encoders = min(encoders, max(1, int(cpus // 2))) if cpus else encoders
    return Topology("split", encode_request, encoders, Request(decode, config.decode_labels))


def _encoder_cpus(config: PlacementConfig, shapes: list[Mapping[str, float]], gpus: float, alone: bool) -> float:
    """As many as it has threads, where its nodes have them; beside a GPU its share of the node's, at most."""
    hosts = [shape for shape in shapes if shape.get("GPU", 0) >= gpus] if gpus else shapes
    if not hosts:
        return float(config.threads)
    if gpus:
        share = min(shape.get("CPU", 0) / shape["GPU"] for shape in hosts if shape.get("GPU")) * gpus
        feeders = alone or any(shape.get("CPU", 0) >= 1 and not shape.get("GPU") for shape in shapes)
        return _floor(min(config.threads, share if feeders else share / 2))
    largest = max(shape.get("CPU", 0) for shape in hosts)
    if not largest:
        return float(config.threads)
    lonely = not alone and sum(shape.get("CPU", 0) for shape in shapes) < 2  # one CPU for both stages
    return _floor(min(config.threads, largest / 2 if lonely else largest))


def _decoder_cpus(shapes: list[Mapping[str, float]], encode: Mapping[str, float], gpus: float) -> float:
    """One, or what the encoders leave over on nodes too small for that."""
    left = []
    for shape in shapes:
        held = min(shape.get("GPU", 0) / gpus, 1e9) * encode["CPU"] if gpus else 0.0
        left.append(shape.get("CPU", 0) - held)
    if not gpus and sum(left) < 2 and left:
        return 0.25
    return 1.0 if not left or max(left) >= 1 or max(left) <= 0 else max(0.25, _floor(max(left) / 2))


def _floor(share: float) -> float:
    """Ray's resources have four decimals; rounding up could ask for more than there is."""
    return int(share * 1000) / 1000
