"""cluster.yaml is a file that Ray's cluster launcher accepts, with the three kinds of node the jobs ask for."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    result = prepare_config(config)
    validate_config(result)
    return result


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    result = prepared(config)
    assert result["head_node_type"] == "head"
    assert set(result["available_node_types"]) == {"head", "decode", "gpu"}


def test_a_misspelt_key_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker"):
        prepared({**config, "max_worker": 3})


def test_workers_start_at_zero_and_fit_below_the_total(config: dict[str, Any]) -> None:
    workers = {name: node for name, node in config["available_node_types"].items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"]


def test_the_head_runs_no_work_and_only_gpu_nodes_have_gpus(config: dict[str, Any]) -> None:
    nodes = config["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    assert {name for name, node in nodes.items() if node["resources"].get("GPU")} == {"gpu"}


def test_nothing_listens_beyond_loopback_by_itself(config: dict[str, Any]) -> None:
    assert all("0.0.0.0" not in command for command in config["head_start_ray_commands"])


def test_what_must_be_changed_is_marked_and_never_a_stale_id() -> None:
    images = [line.split("ImageId:")[1].strip() for line in CLUSTER.read_text().splitlines() if "ImageId:" in line]
    assert all("CHANGE-ME" in image or image == "*ubuntu" for image in images) and len(images) == 3


def test_its_commands_are_shell(config: dict[str, Any]) -> None:
    for key in (key for key in config if key.endswith("_commands")):
        for command in config[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


def test_nodes_may_read_the_bucket_run_an_image_and_cost_what_spot_costs(config: dict[str, Any]) -> None:
    for name, node in config["available_node_types"].items():
        assert node["node_config"]["IamInstanceProfile"]["Name"], name
        if name != "head":
            assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
    assert "audiomae:cpu" in config["docker"]["image"]
    assert "audiomae:gpu" in config["available_node_types"]["gpu"]["docker"]["worker_image"]
    assert not any("pip install" in command for key in config if key.endswith("_commands") for command in config[key])
