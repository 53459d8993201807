"""Training and finding lists on a GPU: asked for where there is one, the same lists as on the CPU."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from embedding_sets import clusters

from audiomae.search import index as ann
from audiomae.search.spec import IndexSpec
from ray_jobs.indexing.job import resources

SPEC = IndexSpec(kind="ivf", factory="IVF64,RaBitQfs", nlist=64, nprobe=4)


@pytest.mark.parametrize(
    ("label", "cluster", "gpu_build", "gpus"),
    [
        ("train", {"CPU": 8, "GPU": 1}, True, 1),
        ("lists", {"CPU": 8, "GPU": 4}, True, 1),
        ("segments", {"CPU": 8, "GPU": 4}, True, 0),
        ("train", {"CPU": 8}, True, 0),
        ("train", {"CPU": 8, "GPU": 4}, False, 0),
    ],
)
def test_steps_ask_for_a_gpu_where_it_is_of_use(
    label: str, cluster: dict[str, float], gpu_build: bool, gpus: int
) -> None:
    needed = resources(label, cluster, gpu_build)
    assert needed["CPU"] == 1 and needed.get("GPU", 0) == gpus


def test_a_gpu_gives_the_lists_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = faiss.get_num_gpus()
    if count == 0:
        pytest.skip("faiss finds no GPU")
    assert ann.can_use_gpus()
    rows = ann.to_rows(clusters(4000, 64))
    found = {}
    for place, gpus in (("gpu", count), ("cpu", 0)):
        monkeypatch.setattr(faiss, "get_num_gpus", lambda gpus=gpus: gpus)
        (tmp_path / place).mkdir()
        ann.train(SPEC, rows, tmp_path / place)
        found[place] = ann.assign(tmp_path / "gpu" / ann.TRAINED_FILE, rows)
    assert (found["gpu"] == found["cpu"]).mean() > 0.999  # of one quantiser
    centroids = [ann.Quantiser(tmp_path / place).centroids for place in ("gpu", "cpu")]
    fits = [(rows.astype(np.float32) @ some.T).max(axis=1).mean() for some in centroids]
    assert fits[0] == pytest.approx(fits[1], abs=0.01)  # of each its own
