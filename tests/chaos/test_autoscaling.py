"""From no worker at all: an embedding job waits, its demand is seen, what joins is busy, and all is given back."""

import threading
import time
from pathlib import Path

import pytest
import ray
import soundfile
from autoscaling import autoscaling_cluster
from conftest import ROOT, another_cluster
from serving import CLASSES, make_encoder, sound

from audiomae.artifacts.embeddings import EmbeddingSet
from ray_jobs import embed_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FILES = 150
TYPES = {
    "cpu": {"resources": {"CPU": 2}, "max_workers": 2},
    "gpu": {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2},
}


@pytest.mark.parametrize("types", [["cpu"], ["cpu", "gpu"]], ids=["cpu", "gpu"])
def test_from_zero_workers_and_back(types: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus, encoder, out = tmp_path / "clips", tmp_path / "encoder", tmp_path / "out"
    corpus.mkdir()
    for index in range(FILES):
        soundfile.write(corpus / f"{index:03d}.wav", sound(CLASSES[index % 4], index % 9), 16000)
    make_encoder().save(encoder)
    slow = {"PYTHONPATH": f"{ROOT / 'tests' / 'faults'}:{ROOT}", "AUDIOMAE_FAULT_DELAY_S": "0.5"}
    kinds = {name: TYPES[name] for name in types}
    with another_cluster(), autoscaling_cluster(kinds, environment=slow) as address:
        ray.init(address, log_to_driver=False)
        seen: list[tuple[float, float]] = []
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(done, seen), daemon=True)
        watch.start()
        flags = ["--encoder", str(encoder), "--corpus", str(corpus), "--shard-minutes", "0.2", "--out", str(out)]
        assert embed_corpus.main(flags) == 0
        done.set()
        watch.join()
        until = time.monotonic() + 300
        while len([node for node in ray.nodes() if node["Alive"]]) > 1:
            assert time.monotonic() < until, "the nodes were not given back"
            time.sleep(1)
        ray.shutdown()
    table = EmbeddingSet.open(out).read()
    assert table.num_rows == len(set(table["id"].to_pylist())) == FILES
    assert max(cpus for cpus, _ in seen) >= 0.9 * 4  # all of the CPU nodes
    if "gpu" in types:
        assert max(gpus for _, gpus in seen) == 2
    assert "waiting for nodes: none of the cluster has" in capfd.readouterr().err


def _watch(done: threading.Event, seen: list[tuple[float, float]]) -> None:
    """(busy CPUs, busy GPUs) of the cluster, every second."""
    while not done.wait(1.0):
        total, free = ray.cluster_resources(), ray.available_resources()
        seen.append((total.get("CPU", 0) - free.get("CPU", 0), total.get("GPU", 0) - free.get("GPU", 0)))
