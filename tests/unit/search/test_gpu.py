"""Training and finding lists on a GPU: the same lists as on the CPU."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from embedding_sets import clusters

from audiomae.search import index as ann
from audiomae.search.spec import IndexSpec

SPEC = IndexSpec(kind="ivf", factory="IVF64,RaBitQfs", nlist=64, nprobe=4)


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
    quantisers = [ann.Quantiser(tmp_path / place) for place in ("gpu", "cpu")]
    fits = [quantiser.similarities(rows.astype(np.float32)).max(axis=1).mean() for quantiser in quantisers]
    assert fits[0] == pytest.approx(fits[1], abs=0.01)  # of each its own
