"""Three nodes that share nothing but a bucket, jobs on them as processes of their own, and the loss of a node."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from embed_cluster import FAULTS, ROOT, end, worker_environment

MEMORY = 128 * 1024**2
DEADLINE_S = 900.0  # a guard against hanging, no measure of speed


@dataclass
class Drill:
    """The cluster, what was done to it, and how it went.

    Attributes:
        cluster: a head without CPUs and two workers of one CPU.
        disk: a folder of the head's machine that the workers do not see.
        nodes: worker nodes that are up.
        events: rows of the report: `stage`, `what`, `at_s` seconds after the beginning.
    """

    cluster: Any
    folder: Path
    disk: Path
    nodes: list[Any] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    started: int = 0

    def join(self) -> None:
        """A new node, with a temporary folder and a cache of its own."""
        self.started += 1
        environment = own_disk(self.folder / f"node-{self.started}")
        environment |= {"PYTHONPATH": f"{FAULTS}{os.pathsep}{ROOT}", "AUDIOMAE_FAULT_HIDE": str(self.disk)}
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY, env_vars=environment))

    def lose_node_with(self, title: str, stage: str, job: subprocess.Popen[bytes] | None = None) -> None:
        """SIGKILL all of the node that runs a Ray process of this title as soon as there is one; a new node joins."""
        found: list[Any] = []
        self.wait(lambda: bool(found) or found.extend(self.nodes_with(title)) or bool(found), title, job)
        self.nodes.remove(found[0])
        self.cluster.remove_node(found[0], allow_graceful=False)
        self.note(stage, f"node with {title} killed")
        self.join()
        self.note(stage, "a new node joined")

    def nodes_with(self, title: str) -> list[Any]:
        """The worker node of each Ray process of this title."""
        found = []
        for node in self.nodes:
            (raylet,) = node.all_processes["raylet"]
            with suppress(psutil.Error):
                for process in psutil.Process(raylet.process.pid).children(recursive=True):
                    if title in " ".join(process.cmdline()):
                        found.append(node)
        return found

    def launch(self, script: str, *flags: str) -> subprocess.Popen[bytes]:
        """Start a job on the head, as `ray job submit` does; its output goes to a log."""
        return self._start(sys.executable, str(ROOT / "ray_jobs" / script), *flags)

    def serve(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`serve run --address` of this cluster."""
        program = str(Path(sys.executable).parent / "serve")
        return self._start(
            program, "run", "--name", "search", "--address", self.cluster.address, "serve.app:build", *arguments
        )

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **own_disk(self.folder / "head"), "RAY_ADDRESS": self.cluster.address}
        with self.log.open("ab") as file:
            job = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        self.jobs.append(job)
        return job

    def finish(self, job: subprocess.Popen[bytes], stage: str) -> None:
        """The job must succeed."""
        status = job.wait(timeout=DEADLINE_S)
        assert status == 0, self.log.read_text()[-4000:]
        self.note(stage, "job ended well")

    def wait(self, condition: Callable[[], bool], what: str, job: subprocess.Popen[bytes] | None = None) -> None:
        """Poll; fail when the job ends first, or after minutes."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            ended = job is not None and job.poll() is not None
            assert not ended, f"the job ended before {what}:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)

    def note(self, stage: str, what: str) -> None:
        """A row of the report."""
        self.events.append({"stage": stage, "what": what, "at_s": round(time.monotonic() - self.began, 1)})

    @property
    def log(self) -> Path:
        return self.folder / "jobs.log"

    def report(self) -> Path:
        """The events as a table."""
        path = self.folder / "cluster_drill.md"
        rows = [f"| {row['at_s']:7.1f} | {row['stage']} | {row['what']} |" for row in self.events]
        path.write_text("\n".join(["| s | stage | event |", "|---|---|---|", *rows, ""]))
        path.with_suffix(".json").write_text(json.dumps(self.events, indent=1))
        return path


def own_disk(folder: Path) -> dict[str, str]:
    """Environment of a node that keeps its temporary files and its cache there."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return {"TMPDIR": str(folder / "tmp"), "AUDIOMAE_CACHE": str(folder / "cache")}


@contextmanager
def three_nodes(folder: Path, delay_s: float) -> Iterator[Drill]:
    """A head and two workers whose only common ground is S3; a file takes `delay_s` longer to decode."""
    from ray.cluster_utils import Cluster

    disk = folder / "disk"
    disk.mkdir()
    with worker_environment(AUDIOMAE_FAULT_DELAY_S=str(delay_s)):
        args = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
        drill = Drill(Cluster(initialize_head=True, head_node_args=args), folder, disk)
        try:
            drill.join()
            drill.join()
            yield drill
        finally:
            end(drill.cluster, drill.jobs)
