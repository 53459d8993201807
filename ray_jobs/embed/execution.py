"""The Ray side of `embed_corpus`: the pipeline over the shards of a plan, retried until every shard is committed."""

import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from audiomae.artifacts.embeddings import committed_shards, compact_receipts
from audiomae.cli import Progress
from audiomae.corpus.decode import probe
from audiomae.corpus.manifest import open_source
from audiomae.embedding.decoding import EmbedJob
from audiomae.embedding.payload import decode_shards
from audiomae.embedding.plan import ShardEntry
from audiomae.embedding.stages import EncodeStage, FusedStage
from audiomae.errors import DecodeError
from ray_jobs._cluster import cpus_now, hint, notice_of_waiting
from ray_jobs._ray import quiet_data_context, without_false_alarm
from ray_jobs.embed.topology import DECODERS_ANNOUNCED, Topology

PASSES = 4  # in a row that finish no shard
PROBES_PER_TASK = 32
ROUND_SHARDS = 16_384  # given to Ray Data at once: the driver's memory and time for them stay bounded
MOST_SHARDS_A_BLOCK, FILES_A_BLOCK, BLOCKS_A_ROUND, BLOCKS_A_WORKER = 256, 256, 2_048, 8
# a lost worker is replaced for as long as the job runs, but a shard that keeps killing its worker is given up
WORKER_FAULTS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 1}
# at once in a worker: one computes while the other reads or commits
TWO_CALLS: dict[str, Any] = {"max_concurrent_calls_per_actor": 2, "enable_true_multi_threading": True}


def run_passes(job: EmbedJob, pending: Sequence[ShardEntry], topology: Topology) -> list[dict[str, Any]]:
    """Embed the pending shards, some thousands at a time, and copy their receipts together as they come.

    Returns the reports of all shards that were finished or failed with a reason.
    """
    reports: list[dict[str, Any]] = []
    total = sum(entry.items for entry in pending)
    with Progress("embedding", total, "files") as progress, ThreadPoolExecutor(1) as compactor:
        compacted: list[Future[int]] = []
        for start in range(0, len(pending), ROUND_SHARDS):
            reports += _run_round(job, pending[start : start + ROUND_SHARDS], topology, progress)
            compacted.append(compactor.submit(compact_receipts, job.out))
        for future in compacted:
            future.result()
    return reports


def _run_round(
    job: EmbedJob, pending: Sequence[ShardEntry], topology: Topology, progress: Progress
) -> list[dict[str, Any]]:
    """Embed these; what a first pass leaves (its worker kept dying) is retried file by file in isolation."""
    reports: list[dict[str, Any]] = []
    idle_passes = 0
    isolate = False
    while pending and idle_passes < PASSES:
        for report in _run(job.model_copy(update={"isolate": isolate}), pending, topology):
            reports.append(report)
            _warn_of_idle_gpus(reports, topology)
            if report["status"] == "error":
                print(f"shard {report['shard']} was not finished: {report['message']}", file=sys.stderr)
            else:
                progress.update(report["inputs"])
        committed = committed_shards(job.out)
        idle_passes = 0 if any(entry.name in committed for entry in pending) else idle_passes + 1
        isolate = True
        pending = [entry for entry in pending if entry.name not in committed]
        if pending:
            lost = sum(entry.items for entry in pending)
            print(f"{len(pending)} shards ({lost:,} files) were not finished; trying them again, each file isolated")
    return reports


def _warn_of_idle_gpus(reports: Sequence[dict[str, Any]], topology: Topology) -> None:
    """Say it once when encoders hold a GPU and compute on the CPU."""
    if not topology.encode.resources.get("GPU") or reports[-1]["device"] != "cpu":
        return
    if sum(bool(report["device"]) for report in reports) == 1:
        print(
            "an encoder holds a GPU but computes on the CPU: torch sees no CUDA device there; install torch's CUDA "
            "build and the driver on those nodes, or give --num-gpus-per-encoder 0",
            file=sys.stderr,
        )


def _run(job: EmbedJob, pending: Sequence[ShardEntry], topology: Topology) -> Iterator[dict[str, Any]]:
    context = quiet_data_context()  # it would print a traceback per lost worker: run_passes says it in a line
    context.max_errored_blocks = -1  # a shard whose worker died is retried by run_passes, not fatal
    context.target_max_block_size = None  # blocks stay as they are
    fused = topology.kind == "fused"
    most = MOST_SHARDS_A_BLOCK if fused else 1  # decoded shards are large: each is a block
    blocks = blocks_of(pending, int(cpus_now()), most)
    # from_arrow would start a task, and a process for it, to look at each block
    dataset: Dataset = ray.data.from_blocks(
        [pa.table({"entries": [texts]} if fused else {"entry": texts}) for texts in blocks]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = _fused(dataset, job, topology) if fused else _split(dataset, job, topology)
    decoders = min(len(pending), DECODERS_ANNOUNCED * topology.encoders) if topology.decode else 0
    try:
        with (
            without_false_alarm(),
            notice_of_waiting(topology.encode, topology.encoders),
            hint(topology.decode or topology.encode, decoders),
        ):
            yield from dataset.iter_rows()
    except (RayError, ExecutionTimeoutError) as error:
        print(f"the pipeline stopped: {type(error).__name__}: {str(error)[-2000:]}", file=sys.stderr)


def blocks_of(pending: Sequence[ShardEntry], workers: int, most: int) -> Iterator[list[str]]:
    """The shards in blocks, each one task: single ones while they are few, several where they are many for the workers.

    Ray Data spends some 30 ms of the driver on a task, and ten thousand of them at once held it up for good; it hands
    out new ones five times a second. Large shards go one by one as long as that gives few tasks, so that progress shows
    soon. Blocks shrink towards the end, so that the workers finish together; no shard is lost with its block, since
    what is committed is skipped when the block is tried again.
    """
    most_files = max(FILES_A_BLOCK, sum(entry.items for entry in pending) // BLOCKS_A_ROUND)
    at = 0
    while at < len(pending):
        count = max(1, min(most, (len(pending) - at) // (BLOCKS_A_WORKER * max(workers, 4))))
        files = itertools.accumulate(entry.items for entry in pending[at : at + count])
        count = max(1, sum(total <= most_files for total in files))
        yield [entry.model_dump_json() for entry in pending[at : at + count]]
        at += count


def _fused(dataset: Dataset, job: EmbedJob, topology: Topology) -> Dataset:
    return dataset.map_batches(
        FusedStage,
        fn_constructor_args=[job],
        batch_size=1,  # a row is a block of shards
        batch_format="pyarrow",
        compute=_pool(topology, max_tasks_in_flight_per_actor=2, **TWO_CALLS),
        scheduling_strategy="SPREAD",
        **topology.encode.options,
        **WORKER_FAULTS,
    )


def _split(dataset: Dataset, job: EmbedJob, topology: Topology) -> Dataset:
    assert topology.decode is not None
    decoded = dataset.map_batches(
        partial(decode_shards, job),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(),
        **topology.decode.options,
        max_retries=1,
    )
    return decoded.map_batches(
        EncodeStage,
        fn_constructor_args=[job],
        batch_size=1,
        batch_format="pyarrow",
        compute=_pool(
            topology,
            max_tasks_in_flight_per_actor=3,
            **TWO_CALLS,
        ),
        **topology.encode.options,
        **WORKER_FAULTS,
    )


def _pool(topology: Topology, **settings: Any) -> ActorPoolStrategy:
    """Encoders that wait for their nodes: an autoscaler sees each, and each starts when a node has room for it.

    Where encoders and decode tasks share the CPUs, the pool must leave some, so Ray Data decides how many there are.
    """
    most = topology.encoders
    if topology.decode is not None and not topology.encode.resources.get("GPU"):
        return ActorPoolStrategy(min_size=1, max_size=most, initial_size=most, **settings)
    return ActorPoolStrategy(min_size=most, max_size=most, **settings)


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
