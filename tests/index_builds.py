"""`build_index.py` in processes of its own, killed between any two things it does to disk or network.

The processes are forked from a server that has imported everything, so that one costs a fraction of a second. The steps
of the build run in the process itself, without Ray: what is killed is the job and every step of it at once.
"""

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audiomae import storage

START_S = 300  # of a busy machine
# what a process does to the world outside, as Python's audit hooks tell it; any of it may be the last thing done
EVENTS = ("os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.", "http.client.send")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["index_builds", "ray_jobs.build_index", "ray_jobs.indexing.job"])


@dataclass
class Ended:
    """How a build ended: exit status (-9 for killed), effects it had until then, what it printed."""

    status: int
    effects: int
    printed: str


@dataclass
class Build:
    """One command line.

    Attributes:
        out: INDEX.
        embeddings: the sets.
        log: a file that takes what is printed.
    """

    out: str
    embeddings: list[str]
    log: Path
    extra: list[str] = field(default_factory=list)

    def start(self, kill_after: int | None = None, barrier: Any = None) -> "Running":
        """Start it; it ends itself with SIGKILL after so many effects."""
        effects = _CONTEXT.Value("q", 0)
        argv = ["--embeddings", *self.embeddings, "--out", self.out, "--encoder", "none", *self.extra]
        arguments = (argv, str(self.log), kill_after, effects, barrier, dict(os.environ))
        process = _CONTEXT.Process(target=_run, args=arguments)
        process.start()
        return Running(self, process, effects)

    def run(self, kill_after: int | None = None) -> Ended:
        """Run it to its end, whatever that is."""
        return self.start(kill_after).wait()


@dataclass
class Running:
    """A build that was started."""

    build: Build
    process: Any
    effects: Any

    def wait(self) -> Ended:
        """How it ended."""
        self.process.join(START_S)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the build did not end: {self.build.log.read_text()[-2000:]}")
        return Ended(self.process.exitcode, self.effects.value, self.build.log.read_text())


def _run(argv: list[str], log: str, kill_after: int | None, effects: Any, barrier: Any, env: dict[str, str]) -> None:
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from audiomae.cli import run_job
    from ray_jobs.build_index import main
    from ray_jobs.indexing import job

    job.run_tasks = lambda label, step, calls: [step(*call) for call in calls]
    job._save_encoder = lambda given, sets, base, fingerprint, target: storage.write_json(
        target / "config.json", {"fingerprint": fingerprint}
    )
    if barrier is not None:
        barrier.wait(START_S)

    def count(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.startswith(EVENTS):
            effects.get_obj().value += 1
            if kill_after is not None and effects.get_obj().value > kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    status: Any = 1
    try:
        run_job(lambda: main(argv))
    except SystemExit as ended:
        status = ended.code
    finally:  # without what multiprocessing would do to the descriptors
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def content(index: str) -> dict[str, bytes]:
    """All files of an index but those that say when and by whom; a version is called by its place in their order."""
    files = dict(storage.walk_files(index))
    versions = sorted({name.partition("/")[0] for name in files if name.startswith("v0")})
    found = {}
    for name, path in files.items():
        top, _, rest = name.partition("/")
        if rest in ("CLAIM", "release.json") or top in ("history", "LATEST", "reports"):
            continue
        found[f"version {versions.index(top)}/{rest}" if top in versions else name] = storage.read_bytes(path)
    return found


def left_over(index: str) -> set[str]:
    """What lies in an index beside the version in force, its pieces and its history."""
    from audiomae.artifacts import releases

    release = releases.resolve(index)
    named = {release.version, *(segment["name"] for segment in release.info["segments"])}
    named |= {str(release.info["quantiser"])}
    names = {name for name, _ in storage.walk_files(index)}
    reports = {f"reports/{name.partition('/')[0]}.html" for name in names if name.endswith("/release.json")}
    return {
        name
        for name in names - reports
        if name != "LATEST" and not name.startswith("history/") and not any(name.startswith(f"{n}/") for n in named)
    }
