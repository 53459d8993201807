"""What the steps of an index build ask of the cluster."""

import pytest

from ray_jobs.indexing.job import resources


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
