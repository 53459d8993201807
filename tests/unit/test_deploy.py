"""The Dockerfile follows the Makefile; the Kubernetes files hold what KubeRay knows and the jobs take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
POD = {"template", "rayStartParams", "labels", "resources"}
# fields of ray.io/v1, KubeRay 1.6
FIELDS = {
    "RayCluster": {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
        "gcsFaultToleranceOptions",
        "upgradeStrategy",
        "suspend",
    },
    "RayJob": {
        "clusterSelector",
        "submissionMode",
        "backoffLimit",
        "entrypoint",
        "runtimeEnvYAML",
        "rayClusterSpec",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "suspend",
    },
    "RayService": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"},
    "head": POD | {"serviceType", "headService", "enableIngress"},
    "worker": POD | {"groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts"},
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["cluster", "train", "embed", "index", "service"])
def test_kuberay_knows_every_field(name: str) -> None:
    resource = read(name)
    assert resource["apiVersion"] == "ray.io/v1" and resource["metadata"]["name"]
    spec = resource["spec"]
    assert spec.keys() <= FIELDS[resource["kind"]]
    cluster = spec if resource["kind"] == "RayCluster" else spec.get("rayClusterConfig")
    if cluster is None:
        assert spec["clusterSelector"] == {"ray.io/cluster": read("cluster")["metadata"]["name"]}
        return
    assert cluster.keys() <= FIELDS["RayCluster"] and cluster["headGroupSpec"].keys() <= FIELDS["head"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # the control plane is not starved
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["worker"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert (
            container["resources"]["requests"].items() >= {"memory": container["resources"]["limits"]["memory"]}.items()
        )
    strings = [
        value
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for value in group["rayStartParams"].values()
    ]
    assert all(isinstance(value, str) for value in strings)  # the definition takes nothing else


def test_the_cluster_starts_with_its_head_alone_and_its_ray_is_ours() -> None:
    pinned = re.search(r"^ray(?:\[.*\])?==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert (
        read("cluster")["spec"]["rayVersion"] == read("service")["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]
    )
    assert all(group["replicas"] == 0 for group in read("cluster")["spec"]["workerGroupSpecs"])


@pytest.mark.parametrize("name", ["train", "embed", "index"])
def test_the_jobs_would_take_their_command_lines(name: str) -> None:
    python, script, *words = shlex.split(read(name)["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script.removeprefix("/app/")).exists()
    files = [word for word in words if word.startswith("/app/")]
    assert all((ROOT / file.removeprefix("/app/")).exists() for file in files)
    flags = {word for word in words if word.startswith("--")}
    assert flags <= flags_of(script.removeprefix("/app/"))


def flags_of(script: str) -> set[str]:
    """What the job's `--help` lists."""
    import subprocess
    import sys

    text = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT)
    return set(re.findall(r"--[a-z][a-z0-9.-]*", text.stdout))


def test_the_service_takes_its_arguments_and_runs_two_of_each_deployment() -> None:
    from audiomae.config import build_config
    from serve.arguments import ServeArgs

    (application,) = yaml.safe_load(read("service")["spec"]["serveConfigV2"])["applications"]
    build_config(ServeArgs, application["args"])
    assert application["import_path"] == "serve.app:build"
    replicas = {deployment["name"]: deployment["num_replicas"] for deployment in application["deployments"]}
    (ours,) = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())["applications"]
    assert replicas == {deployment["name"]: 2 for deployment in ours["deployments"]}


def test_the_image_is_made_as_the_makefile_makes_the_environment() -> None:
    dockerfile, makefile = (ROOT / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt --editable" in dockerfile and "--constraint constraints.txt" in makefile
    faiss = re.compile(r"faiss-gpu==[0-9.]+")
    assert faiss.findall(dockerfile) == faiss.findall(makefile)
    python = re.search(r"ARG PYTHON=(\S+)", dockerfile)
    assert python is not None and f"python{python[1]}" in makefile
    copied = re.findall(r"^COPY (\S+) \S+$", dockerfile, re.MULTILINE)
    assert set(copied) == {"audiomae", "ray_jobs", "serve"}
