"""`ray start --head`, then the jobs as their users start them: `ray job submit --working-dir . -- python ...`."""

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from embedding_sets import clusters, make_set, tiny_encoder

from audiomae import AudioIndex
from audiomae.corpus.synthetic import generate
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from serve.proxy import free_ports
from tests.processes import kill_family

pytestmark = pytest.mark.timeout(1800)  # minutes on a busy machine
ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent


class Head:
    """A head node, as `ray start --head` makes one; `env` is the environment of its clients."""

    def __init__(self) -> None:
        port, dashboard, client_port = free_ports(3)
        self._temp = tempfile.TemporaryDirectory(prefix="ray-")
        env = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS"}}
        env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        env |= {"RAY_health_check_timeout_ms": "120000", "RAY_health_check_failure_threshold": "40"}  # slow is not dead
        command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
        command += [f"--dashboard-port={dashboard}", f"--temp-dir={self._temp.name}", "--num-cpus=4"]
        # the agent begins to listen late: a port that is free now may not be then
        command += ["--dashboard-agent-listen-port=0", "--object-store-memory=400000000"]
        command += [f"--ray-client-server-port={client_port}", "--disable-usage-stats"]
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=env, stdout=nothing, stderr=nothing, start_new_session=True)
        self.env = env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        _wait_for_dashboard(f"http://127.0.0.1:{dashboard}/api/version", self._process)

    def log(self) -> str:
        """What the agent that runs jobs said last, and whether the head still runs."""
        files = sorted(Path(self._temp.name).glob("session_latest/logs/*agent*"))
        said = [f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files]
        return "\n".join([f"the head's exit status: {self._process.poll()}", *said])

    def stop(self) -> None:
        """End it and all that it started."""
        kill_family(self._process)
        self._temp.cleanup()


class Heads:
    """The head in use; another takes its place when its agent takes no jobs, as happens where Ray gets no CPU."""

    def __init__(self) -> None:
        self.now = Head()

    def replace(self) -> None:
        """Another one, and what was the matter with the last as a warning."""
        warnings.warn(self.now.log(), stacklevel=1)
        self.now.stop()
        self.now = Head()


@pytest.fixture(scope="module")
def head() -> Iterator[Heads]:
    heads = Heads()
    yield heads
    heads.now.stop()


def _wait_for_dashboard(url: str, process: "subprocess.Popen[bytes]") -> None:
    transport = httpx.HTTPTransport(retries=0)
    with httpx.Client(transport=transport, timeout=5) as client:
        while process.poll() is None:
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)  # what it waits for needs the CPU
    raise AssertionError(f"ray start ended with {process.returncode}")


def _submit(head: Heads, *command: str) -> subprocess.CompletedProcess[str]:
    """Submit and wait."""
    line = [BIN / "ray", "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, *command]
    for _ in range(5):
        done = subprocess.run(line, env=head.now.env, cwd=ROOT, capture_output=True, text=True, timeout=800)
        if "submitted successfully" in done.stdout:
            break
        head.replace()
    return done


def test_what_a_submitted_job_says_and_how_it_ends(head: Heads, tmp_path: Path) -> None:
    make_set(tmp_path / "embeddings", clusters(30, 16))
    done = _submit(head, "-m", "audiomae.artifacts", "verify", str(tmp_path / "embeddings"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SUCCEEDED" in done.stdout.upper() and "embeddings" in done.stdout


@pytest.mark.slow
def test_an_index_built_by_a_submitted_job(head: Heads, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    vectors = clusters(300, encoder.dim, seed=0)
    make_set(tmp_path / "embeddings", vectors, fingerprint=encoder.fingerprint, encoder=str(tmp_path / "encoder"))
    build = ["ray_jobs/build_index.py", "--embeddings", str(tmp_path / "embeddings"), "--out", str(tmp_path / "index")]
    done = _submit(head, *build)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SUCCEEDED" in done.stdout.upper() and "published " in done.stdout
    assert len(AudioIndex.open(tmp_path / "index")) == 300


@pytest.mark.slow
def test_training_as_a_submitted_job(head: Heads, tmp_path: Path) -> None:
    corpus = generate(tmp_path / "corpus", num_clips=40, seed=3, bad_files=True)
    train = ["ray_jobs/train.py", "--config", "ray_jobs/recipes/debug.yaml", "--corpus", str(corpus)]
    train += ["--set", "epochs=1", "--set", "workers.num=1"]
    done = _submit(head, *train, "--storage", str(tmp_path / "runs"), "--name", "submitted")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "submitted" / "encoder" / "model.safetensors").exists()
    assert "decoding: " in done.stdout and "Execution plan" not in done.stdout  # our progress, not Ray Data's log


@pytest.mark.slow
def test_embedding_as_a_submitted_job(head: Heads, tmp_path: Path) -> None:
    corpus = generate(tmp_path / "corpus", num_clips=40, seed=3, bad_files=True)
    encoder = AudioEncoder.from_config(EncoderConfig.model_validate({"backbone": {"size": "debug"}}))
    encoder.save(tmp_path / "encoder")
    embed = ["ray_jobs/embed_corpus.py", "--encoder", str(tmp_path / "encoder"), "--corpus", str(corpus), "--per-file"]
    done = _submit(head, *embed, "--out", str(tmp_path / "embeddings"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SUCCEEDED" in done.stdout.upper() and "Execution plan" not in done.stdout
    assert (tmp_path / "embeddings" / "run.json").exists()


def test_a_failing_job_has_the_right_exit_status(head: Heads, tmp_path: Path) -> None:
    done = _submit(head, "ray_jobs/train.py", "--set", "modle.size=tiny", "--corpus", str(tmp_path), "--name", "x")
    assert done.returncode != 0
    assert "modle" in done.stdout + done.stderr
