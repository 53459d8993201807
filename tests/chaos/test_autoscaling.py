"""From no worker at all: a job waits, its demand is seen, what joins is busy, and all is given back."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import soundfile
from autoscaling import autoscaling_cluster
from conftest import ROOT, another_cluster
from serving import CLASSES, make_encoder, sound

from audiomae.artifacts.embeddings import EmbeddingSet
from ray_jobs import embed_corpus, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FILES, TRAINED = 150, 24
DEADLINE_S = 600  # a guard against hanging, no measure of speed
TYPES = {
    "cpu": {"resources": {"CPU": 2}, "max_workers": 2},
    "gpu": {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2},
}
DEBUG = str(ROOT / "ray_jobs" / "recipes" / "debug.yaml")


def clips(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        soundfile.write(folder / f"{index:03d}.wav", sound(CLASSES[index % 4], index % 9), 16000)
    return folder


def busiest(types: list[str], job: Callable[[], int], environment: dict[str, str]) -> dict[str, float]:
    """The most CPUs and GPUs that were busy at once while the job ran, from no worker on; all is given back."""
    kinds = {name: TYPES[name] for name in types}
    seen = {"CPU": 0.0, "GPU": 0.0}
    with another_cluster(), autoscaling_cluster(kinds, environment=environment) as address:
        ray.init(address, log_to_driver=False)
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(done, seen), daemon=True)
        watch.start()
        assert job() == 0
        done.set()
        watch.join()
        until = time.monotonic() + DEADLINE_S
        while len([node for node in ray.nodes() if node["Alive"]]) > 1:
            assert time.monotonic() < until, "the nodes were not given back"
            time.sleep(1)
        ray.shutdown()
    return seen


def _watch(done: threading.Event, seen: dict[str, float]) -> None:
    while not done.wait(1.0):
        total, free = ray.cluster_resources(), ray.available_resources()
        for name in seen:
            seen[name] = max(seen[name], total.get(name, 0) - free.get(name, 0))


@pytest.mark.parametrize("types", [["cpu"], ["cpu", "gpu"]], ids=["cpu", "gpu"])
def test_embedding_from_zero_workers_and_back(
    types: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, encoder, out = clips(tmp_path / "clips", FILES), tmp_path / "encoder", tmp_path / "out"
    make_encoder().save(encoder)
    slow = {"PYTHONPATH": f"{ROOT / 'tests' / 'faults'}:{ROOT}", "AUDIOMAE_FAULT_DELAY_S": "0.5"}
    flags = ["--encoder", str(encoder), "--corpus", str(corpus), "--shard-minutes", "0.2", "--out", str(out)]
    seen = busiest(types, lambda: embed_corpus.main(flags), slow)
    table = EmbeddingSet.open(out).read()
    assert table.num_rows == len(set(table["id"].to_pylist())) == FILES
    assert seen["CPU"] >= 0.9 * 4  # all of the CPU nodes
    assert seen["GPU"] == (2 if "gpu" in types else 0)
    if "gpu" in types:  # nodes with CPUs have come before, for what looks at the files' lengths
        assert "waiting for nodes: none of the cluster has" in capfd.readouterr().err


def test_training_waits_for_gpus_that_are_not_up_yet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The debug recipe as it is: `workers.gpu: auto`, two workers."""
    corpus = clips(tmp_path / "clips", TRAINED)
    flags = ["--config", DEBUG, "--set", "epochs=2", "--set", "batch_size=4", "--corpus", str(corpus)]
    flags += ["--storage", str(tmp_path / "runs"), "--name", "run"]
    seen = busiest(["cpu", "gpu"], lambda: train.main(flags), {})
    said = capfd.readouterr()
    assert seen["GPU"] == 2 and "training on the CPU" not in said.out
    assert "waiting for nodes: none of the cluster has 1 CPU + 1 GPU" in said.err
    assert (tmp_path / "runs" / "run" / "encoder" / "model.safetensors").exists()
