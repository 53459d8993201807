"""`serve deploy serve/config.yaml` on a cluster with a dashboard: the file as it is, but for the index and the port."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import another_cluster
from serving import PATIENCE_S, TOKEN, as_file, make_corpus, make_encoder, publish_release, sound

from serve.proxy import free_ports

CONFIG = Path(__file__).resolve().parents[2] / "serve" / "config.yaml"
CLIP = as_file(sound("tone", 0))


def deploy(config: dict[str, Any], dashboard: str, folder: Path) -> None:
    """`serve deploy`, and wait until `serve status` says that everything runs."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    program = str(Path(sys.executable).with_name("serve"))
    done = subprocess.run([program, "deploy", str(file), "-a", dashboard], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    until = time.monotonic() + 4 * PATIENCE_S
    while True:
        status = subprocess.run([program, "status", "-a", dashboard], capture_output=True, text=True, timeout=120)
        application = yaml.safe_load(status.stdout)["applications"]["search"]
        if application["status"] == "RUNNING":
            return
        assert application["status"] != "DEPLOY_FAILED" and time.monotonic() < until, status.stdout
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_config_file_deploys_and_a_rollback_survives_a_change_of_it(tmp_path: Path) -> None:
    import ray

    corpus = make_corpus(tmp_path / "corpus")
    for seed in (0, 1):
        publish_release(tmp_path / "index", corpus, make_encoder(seed), tmp_path / f"staging-{seed}")
    config = yaml.safe_load(CONFIG.read_text())
    port, dashboard_port = free_ports(2)
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"]["index"] = str(tmp_path / "index")
    application["runtime_env"]["env_vars"]["AUDIOMAE_ADMIN_TOKEN"] = TOKEN
    with another_cluster():
        # logical CPUs: the file reserves some for each replica
        context = ray.init(address="local", num_cpus=8, include_dashboard=True, dashboard_port=dashboard_port)
        dashboard = f"http://{context.dashboard_url}"
        deploy(config, dashboard, tmp_path)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            found = http.post("/search", files={"file": ("clip", CLIP)})
            assert (found.status_code, found.json()["results"][0]["uri"]) == (200, "tone/0.wav")
            assert found.json()["release"] == "v000002"
            headers = {"Authorization": f"Bearer {TOKEN}"}
            reply = http.post("/admin/reload", json={"version": "v000001"}, headers=headers)
            assert reply.status_code == 200, reply.text
            application["args"]["max_audio_s"] = 20
            deploy(config, dashboard, tmp_path)
            assert http.get("/release").json()["version"] == "v000001"
            long = http.post("/search", files={"file": ("clip", as_file(sound("tone", 0, seconds=25)))})
            assert long.json()["code"] == "audio_too_long"
            assert http.post("/search", files={"file": ("clip", CLIP)}).json()["release"] == "v000001"
