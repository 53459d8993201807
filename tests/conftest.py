"""One local Ray cluster for the whole suite, and the real audio that some tests use when it is there."""

import os
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

os.environ.update(
    OMP_NUM_THREADS="1",  # the suite's processes share few cores: threads of one would wait for those of another
    PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),  # of Ray's workers
    RAY_prestart_worker_first_driver="0",  # workers start when there is work for them
    RAY_worker_niceness="0",  # tests wait for them, so they do not come after everything else
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_raylet_start_wait_time_s="180",  # of a busy machine
    RAY_agent_register_timeout_ms="180000",  # likewise; a raylet whose agent is later ends itself
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
    RAY_TRAIN_V2_ENABLED="1",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # as in a Ray that a job starts for itself
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.25",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

_skipped: Counter[str] = Counter()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note why whole modules are skipped."""
    pytest_runtest_logreport(report)


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Note why tests are skipped; `pytest_unconfigure` says it."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_unconfigure() -> None:
    """The last line of a run: what was not tested, and how to get it."""
    if _skipped:
        reasons = "; ".join(f"{count} tests ({reason})" for reason, count in _skipped.items())
        print(f"NOT TESTED: {reasons}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a real S3 protocol server on loopback; the AWS variables of this process point at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    yield endpoint
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """`s3://<a fresh bucket>`."""
    import boto3

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[None]:
    """A local cluster with 4 logical CPUs; jobs called in-process find it through `ray.is_initialized()`.

    It starts after the S3 server, so that its workers inherit the AWS variables.
    """
    import ray

    start_ray()
    yield
    ray.shutdown()


def start_ray() -> None:
    """The suite's own cluster."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=512 * 1024**2,
        log_to_driver=False,
        logging_level="warning",
    )


@contextmanager
def another_cluster() -> Iterator[None]:
    """Leave the suite's cluster, where it is up, for as long as the block runs."""
    import ray

    was_up = ray.is_initialized()
    ray.shutdown()
    try:
        yield
    finally:
        ray.shutdown()
        if was_up:
            start_ray()


@pytest.fixture(scope="module")
def cpu_with_bfloat16() -> Iterator[None]:
    """The precision rule believes that this machine computes bfloat16 in hardware, whatever it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("audiomae.model.devices.native_bfloat16", lambda device: True)
        yield


@pytest.fixture(scope="session")
def esc10() -> Path:
    """The 400 labelled real clips, where the checkout has them."""
    path = SHARED / "data" / "esc10"
    if not path.is_dir():
        pytest.skip(f"real audio not found at {path}")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference values computed by the official AudioMAE++ code."""
    path = SHARED / "golden" / "audiomaepp_small"
    if not path.is_dir():
        pytest.skip(f"golden values not found at {path}")
    return path
