"""Training that is killed ends where training that is not killed ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from audiomae.config import load_config
from audiomae.training.loop import TrainLoop
from audiomae.training.recipe import Recipe
from ray_jobs import train
from tests.processes import kill_family

ROOT = Path(train.__file__).resolve().parent.parent
RECIPE = ROOT / "ray_jobs" / "recipes" / "debug.yaml"
EPOCHS, STEPS_PER_EPOCH = 16, 2
DEADLINE_S = 1200  # a guard against hanging, no measure of speed

pytestmark = pytest.mark.timeout(2 * DEADLINE_S)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """20 noisy tones of two classes."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for index in range(20):
        (folder / f"c{index % 2}").mkdir(exist_ok=True)
        tone = np.sin(2 * np.pi * (300 + 2000 * (index % 2)) * np.arange(32000) / 16000)
        soundfile.write(
            folder / f"c{index % 2}" / f"{index:02d}.wav", 0.3 * tone + 0.02 * draw.normal(size=32000), 16000
        )
    return folder


def arguments(corpus: Path, storage: Path, workers: int) -> list[str]:
    """The same line for every run, but for where it keeps its results; features are decoded once for all."""
    sets = [
        f"data.cache={corpus.parent / 'features'}",
        f"epochs={EPOCHS}",
        f"workers.num={workers}",
        "batch_size=8",
        "data.val_fraction=0.2",
        "validation.every_epochs=8",
    ]
    flags = ["--config", str(RECIPE), *(word for item in sets for word in ("--set", item))]
    return [*flags, "--corpus", str(corpus), "--storage", str(storage), "--name", "run"]


class Keep:
    """A host without ray: keeps the last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def restore(self) -> None:
        return None

    def report(self, metrics: dict, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            shutil.copytree(checkpoint, self.folder / f"checkpoint_{metrics['step']:08d}")

    def progress(self, step: int, total: int, note: str) -> None:
        pass

    def history(self, records: Sequence[dict]) -> None:
        pass


def undisturbed(run: Path, corpus: Path, folder: Path) -> Path:
    """What the job's config and clips give in this process, without ray and in one go."""
    config = load_config(Recipe, [run / "config.yaml"])
    (cache,) = (corpus.parent / "features").iterdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a Ray worker of one CPU: sums are taken in the same order
    try:
        loop = TrainLoop(config, pq.read_table(run / "items.parquet"), cache, torch.device("cpu"), Keep(folder))
        assert loop.run() is None
    finally:
        torch.set_num_threads(threads)
    return folder


def last_state(run: Path) -> dict:
    checkpoint = sorted(run.glob("checkpoint_0*"))[-1]
    return torch.load(checkpoint / "state.pt", weights_only=True)


def assert_same_end(run: Path, other: Path) -> None:
    ours, theirs = last_state(run), last_state(other)
    assert ours["step"] == theirs["step"] == EPOCHS * STEPS_PER_EPOCH
    for name, value in theirs["objective"].items():
        torch.testing.assert_close(ours["objective"][name], value, rtol=0, atol=1e-6)
    losses = [[record["loss"] for record in state["records"]] for state in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == EPOCHS


def registered_step(run: Path) -> int:
    """Step of the last checkpoint that Ray Train knows of; a resumed run starts there."""
    try:
        latest = json.loads((run / "checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]
        return int(latest["checkpoint_dir_name"].rpartition("_")[2])
    except (OSError, ValueError, TypeError):  # not there, half written, or none yet
        return 0


def progress(run: Path) -> dict:
    try:
        return json.loads((run / "progress.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Poll until the run is where the test wants it; fails if it ends before or never gets there."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get to where it should be killed"
        time.sleep(0.02)


def launch_and_kill(command: list[str], run: Path, steps: int) -> int:
    """Start the job, kill it once a checkpoint of that step counts; the step that the next launch begins at."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: registered_step(run) >= steps, lambda: process.poll() is None)
    finally:
        kill_family(process)
    assert not (run / "train.json").exists()
    return registered_step(run)


@pytest.mark.slow
def test_a_job_killed_twice_ends_with_the_weights_of_one_in_one_go(ray_cluster, corpus, tmp_path):
    flags, run = arguments(corpus, tmp_path, workers=1), tmp_path / "run"
    command = [sys.executable, "ray_jobs/train.py", *flags]
    resumed_from = [launch_and_kill(command, run, steps) for steps in (4, 12)]
    assert train.main(flags) == 0
    assert 4 <= resumed_from[0] < resumed_from[1] < EPOCHS * STEPS_PER_EPOCH
    assert_same_end(run, undisturbed(run, corpus, tmp_path / "one-go"))


@pytest.mark.slow
def test_killed_jobs_and_workers_of_two_end_with_the_same_weights(ray_cluster, corpus, tmp_path):
    """Two ranks over gloo: one run in one go, one whose driver is killed twice, one whose first worker is killed."""
    flags = {name: arguments(corpus, tmp_path / name, workers=2) for name in ("whole", "driver", "worker")}
    assert train.main(flags["whole"]) == 0
    run = tmp_path / "driver" / "run"
    for steps in (4, 12):
        launch_and_kill([sys.executable, "ray_jobs/train.py", *flags["driver"]], run, steps)
    assert train.main(flags["driver"]) == 0
    assert_same_end(run, tmp_path / "whole" / "run")

    run, status = tmp_path / "worker" / "run", []
    job = threading.Thread(target=lambda: status.append(train.main(flags["worker"])), daemon=True)
    job.start()
    wait_for(lambda: registered_step(run) >= 4 and progress(run).get("step", 0) >= 4, job.is_alive)
    victim = progress(run)["pid"]
    assert victim != os.getpid()
    os.kill(victim, signal.SIGKILL)
    job.join(DEADLINE_S)
    assert status == [0] and progress(run)["pid"] != victim
    assert_same_end(run, tmp_path / "whole" / "run")
