"""A Ray cluster of its own for embedding jobs that are going to be hurt, and the jobs as processes of their own."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ROOT / "tests" / "faults"
DEADLINE_S = 800.0


@dataclass
class EmbedCluster:
    """A head and a worker node, one CPU each, whose processes have `environment`; `lose_node` kills the worker node."""

    environment: dict[str, str]
    cluster: Any
    jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)
    node: Any = None

    def add_node(self) -> None:
        self.node = self.cluster.add_node(num_cpus=1, object_store_memory=128 * 1024**2)

    def lose_node(self) -> None:
        """SIGKILL everything on the worker node, and put a fresh one in its place."""
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.add_node()

    def launch(self, *flags: str, log: Path) -> subprocess.Popen[bytes]:
        """Start `embed_corpus` with these flags on this cluster; its output goes to `log`."""
        environment = {**os.environ, **self.environment, "RAY_ADDRESS": self.cluster.address}
        command = [sys.executable, str(ROOT / "ray_jobs" / "embed_corpus.py"), *flags]
        with log.open("ab") as file:
            job = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self.jobs.append(job)
        return job

    def kill_worker(self, title: str, rng: random.Random, job: subprocess.Popen[bytes]) -> None:
        """SIGKILL one of this cluster's Ray workers with `title`, as soon as there is one."""

        def killed() -> bool:
            for process in rng.sample(found := self.workers(title), len(found)):
                with contextlib.suppress(psutil.Error):
                    process.kill()
                    return True
            return False

        wait_until(killed, f"a worker titled {title}", job)

    def workers(self, name: str) -> list[psutil.Process]:
        """Processes of this cluster's Ray workers whose title holds `name`."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@contextmanager
def worker_environment(**more: str) -> Iterator[dict[str, str]]:
    """While the block runs, what it starts has the tests' faults and `more` in its environment."""
    own = {"PYTHONPATH": f"{FAULTS}{os.pathsep}{ROOT}", **more}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield own
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def embed_cluster(environment: Mapping[str, str]) -> Iterator[EmbedCluster]:
    """The cluster, with `environment` in all its processes, for as long as the block runs."""
    from ray.cluster_utils import Cluster

    with worker_environment(**environment) as own:
        args = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 256 * 1024**2}
        cluster = EmbedCluster(own, Cluster(initialize_head=True, head_node_args=args))
        try:
            cluster.add_node()
            yield cluster
        finally:
            end(cluster.cluster, cluster.jobs)


def end(cluster: Any, jobs: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs on a cluster, and shut it down."""
    for job in jobs:
        job.kill()
        job.wait()
    cluster.shutdown()


def wait_until(condition: Callable[[], bool], what: str, job: subprocess.Popen[bytes] | None = None) -> None:
    """Poll until the condition holds; fail when the job ends first or it takes minutes."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if job is not None and job.poll() is not None and not condition():
            raise AssertionError(f"the job ended with status {job.returncode} before {what}")
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {DEADLINE_S:g} s in vain for {what}")
        time.sleep(0.02)


def embed_here(encoder: Path, corpus: Path, out: Path, window_s: float) -> Path:
    """What an undisturbed job would leave in `out`, made in this process without Ray."""
    import pyarrow as pa
    import torch

    from audiomae.artifacts.embeddings import write_run
    from audiomae.corpus.manifest import list_corpus
    from audiomae.embedding.decoding import EmbedJob
    from audiomae.embedding.listing import Listing
    from audiomae.embedding.plan import PlanRequest, new_plan
    from audiomae.embedding.stages import FusedStage
    from audiomae.model.encoder import AudioEncoder
    from ray_jobs.configs import EmbedConfig
    from ray_jobs.embed.job import embed_settings

    model, listed = AudioEncoder.load(encoder), list_corpus(str(corpus))
    config = EmbedConfig(encoder=str(encoder), corpus=str(corpus), out=str(out), window_s=window_s)
    settings, _ = embed_settings(config, model, None, [])
    listing = Listing(listed.batches())
    request = PlanRequest(str(encoder), str(corpus), listed.root)
    plan = new_plan(out, listing, settings, lambda uris: [None] * len(uris), request)
    job = EmbedJob(out=str(out), encoder=str(encoder), root=listed.root, settings=settings, manifest=plan.manifest_hash)
    threads = torch.get_num_threads()
    stage = FusedStage(job)  # sets the threads of this process
    for entry in plan.shards:
        stage(pa.table({"entries": [[entry.model_dump_json()]]}))
    torch.set_num_threads(threads)
    write_run(out, settings.model_dump() | {"inputs": plan.num_items})
    return out


def commits(out: Path) -> int:
    """How many shards are committed."""
    return len(list((out / "commits").glob("*.json")))


def a_moment(rng: random.Random) -> None:
    """Up to 0.4 s, so that a kill lands anywhere in a shard."""
    time.sleep(rng.random() * 0.4)
