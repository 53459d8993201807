"""The Ray side of `embed_corpus`: the pipeline over the shards of a plan, retried until every shard is committed."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from audiomae.artifacts.embeddings import committed_shards
from audiomae.cli import Progress
from audiomae.corpus.decode import probe
from audiomae.corpus.manifest import open_source
from audiomae.embedding.decoding import EmbedJob
from audiomae.embedding.payload import decode_shards
from audiomae.embedding.plan import ShardEntry
from audiomae.embedding.stages import EncodeStage, FusedStage
from audiomae.errors import DecodeError
from ray_jobs._ray import quiet_data_context

PASSES = 4
RESERVED_CPU = 0.5  # left free in all: a pool that holds every CPU stops whatever else Ray must run
PROBES_PER_TASK = 32
# a lost worker is replaced for as long as the job runs, but a shard that keeps killing its worker is given up
WORKER_FAULTS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 1}


@dataclass(frozen=True)
class Topology:
    """Where decoding and encoding happen, how many of each, and what each asks of Ray."""

    kind: Literal["fused", "split"]
    encoders: int
    encoder_cpus: float
    encoder_gpus: float = 0.0
    decoders: int = 0
    decoder_cpus: float = 0.0

    def describe(self) -> str:
        where = "GPU" if self.encoder_gpus else "CPU"
        if self.kind == "fused":
            return f"{self.encoders} decode+encode workers on {where}"
        return f"up to {self.decoders} decode tasks, {self.encoders} encode workers on {where}"


def choose_topology(kind: str, workers: int | None, shards: int, cpus: int, gpus: int) -> Topology:
    """Lay the job out over a cluster with this many CPUs and GPUs.

    `auto` without a GPU is `fused`: one worker of one thread per CPU (measured best: nothing is copied between
    processes and no core has two threads). With GPUs it is `split`: one encode worker per GPU, decoding on the CPUs.
    """
    if kind == "auto":
        kind = "split" if gpus else "fused"
    if kind == "fused":
        count = max(1, min(workers or cpus, shards))
        return Topology("fused", count, _floor(min(1.0, (cpus - RESERVED_CPU) / count)), _floor(min(1.0, gpus / count)))
    count = max(1, min(workers or gpus or cpus // 2, shards))
    decoder_cpus = 1.0 if cpus > 1 else 0.25
    encoder_cpus = _floor(min(1.0, max(cpus - decoder_cpus - RESERVED_CPU / 2, 0.25) / count))
    decoders = max(1, int((cpus - count * encoder_cpus) / decoder_cpus))
    return Topology("split", count, encoder_cpus, _floor(min(1.0, gpus / count)), decoders, decoder_cpus)


def cluster_size() -> tuple[int, int]:
    """CPUs and GPUs of the cluster this job is connected to."""
    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))


def run_passes(job: EmbedJob, pending: Sequence[ShardEntry], topology: Topology) -> list[dict[str, Any]]:
    """Embed the pending shards; what a first pass leaves (its worker kept dying) is retried file by file in isolation.

    Returns the reports of all shards that were finished or failed with a reason.
    """
    reports: list[dict[str, Any]] = []
    total = sum(entry.items for entry in pending)
    with Progress("embedding", total, "files") as progress:
        for attempt in range(PASSES):
            for report in _run(job.model_copy(update={"isolate": attempt > 0}), pending, topology):
                reports.append(report)
                if report["status"] == "error":
                    print(f"shard {report['shard']} was not finished: {report['message']}", file=sys.stderr)
                else:
                    progress.update(report["inputs"])
            committed = committed_shards(job.out)
            pending = [entry for entry in pending if entry.name not in committed]
            if not pending:
                break
            lost = sum(entry.items for entry in pending)
            print(f"{len(pending)} shards ({lost:,} files) were not finished; trying them again, each file isolated")
    return reports


def _run(job: EmbedJob, pending: Sequence[ShardEntry], topology: Topology) -> Iterator[dict[str, Any]]:
    context = quiet_data_context()  # it would print a traceback per lost worker: run_passes says it in a line
    context.max_errored_blocks = -1  # a shard whose worker died is retried by run_passes, not fatal
    context.target_max_block_size = None  # a shard is one row and stays one block
    dataset: Dataset = ray.data.from_items(
        [{"entry": entry.model_dump_json()} for entry in pending], override_num_blocks=len(pending)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = _fused(dataset, job, topology) if topology.kind == "fused" else _split(dataset, job, topology)
    try:
        yield from dataset.iter_rows()
    except (RayError, ExecutionTimeoutError) as error:
        print(f"the pipeline stopped: {type(error).__name__}: {str(error)[-2000:]}", file=sys.stderr)


def _fused(dataset: Dataset, job: EmbedJob, topology: Topology) -> Dataset:
    return dataset.map_batches(
        FusedStage,
        fn_constructor_args=[job],
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=1, max_size=topology.encoders, initial_size=topology.encoders, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=topology.encoder_cpus,
        num_gpus=topology.encoder_gpus,
        scheduling_strategy="SPREAD",
        **WORKER_FAULTS,
    )


def _split(dataset: Dataset, job: EmbedJob, topology: Topology) -> Dataset:
    decoded = dataset.map_batches(
        partial(decode_shards, job),
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=topology.decoders),
        num_cpus=topology.decoder_cpus,
        scheduling_strategy="SPREAD",
        max_retries=1,
    )
    # two calls at once per worker: one encodes while the other unpacks, builds its table and commits
    return decoded.map_batches(
        EncodeStage,
        fn_constructor_args=[job],
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=topology.encoders,
            initial_size=topology.encoders,
            max_tasks_in_flight_per_actor=3,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        num_cpus=topology.encoder_cpus,
        num_gpus=topology.encoder_gpus,
        **WORKER_FAULTS,
    )


def probe_durations(root: str, uris: list[str]) -> list[float | None]:
    """Seconds of audio of each file by its header, in Ray tasks; `None` where that cannot be told."""
    chunks = [uris[start : start + PROBES_PER_TASK] for start in range(0, len(uris), PROBES_PER_TASK)]
    task = ray.remote(num_cpus=0.5, max_retries=0)(_durations)
    durations: list[float | None] = []
    for chunk, reference in [(chunk, task.remote(root, chunk)) for chunk in chunks]:
        try:
            found: list[float | None] = ray.get(reference)
        except RayError:  # a header that kills its reader: found again, and quarantined, when it is decoded
            found = [None] * len(chunk)
        durations += found
    return durations


def _durations(root: str, uris: list[str]) -> list[float | None]:
    return [_duration(root, uri) for uri in uris]


def _duration(root: str, uri: str) -> float | None:
    try:
        info = probe(open_source(root, uri))
        return info.duration_s if info.exact_seek else None  # else each segment would be decoded from the start
    except DecodeError:
        return None


def _floor(share: float) -> float:
    """Ray's resources have four decimals; rounding up could ask for more than there is."""
    return int(share * 1000) / 1000
