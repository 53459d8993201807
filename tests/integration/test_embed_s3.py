"""Embedding from S3 to S3 through a server that fails in all its ways: retried, then a failure row, never a hole."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from embed_cluster import DEADLINE_S, EmbedCluster, embed_cluster, embed_here, wait_until
from faulty_s3 import FAULTS, FaultyS3, every, faulty_s3

from audiomae.artifacts.embeddings import EmbeddingSet, column_to_vectors
from audiomae.corpus.synthetic import generate
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.storage import copy_tree, read_json, to_path

pytestmark = pytest.mark.timeout(2400)  # minutes on a busy machine
FLAGS = ["--window-s", "2", "--shard-minutes", "0.3"]


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultyS3]:
    """A bad day: every ninth request fails, in four ways by turns, whatever it was."""
    with faulty_s3(s3_server, every(9)) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(proxy: FaultyS3) -> Iterator[EmbedCluster]:
    with embed_cluster({"AWS_ENDPOINT_URL": proxy.endpoint, "AUDIOMAE_FAULT_DELAY_S": "0.05"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"}))).save(directory)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("corpus"), num_clips=40)


def test_a_bad_day_on_s3_and_a_killed_driver_lose_nothing(
    cluster: EmbedCluster, proxy: FaultyS3, encoder: Path, corpus: Path, s3_bucket: str, tmp_path: Path
) -> None:
    copy_tree(corpus, f"{s3_bucket}/corpus")
    out = to_path(f"{s3_bucket}/out")
    flags = ["--encoder", str(encoder), "--corpus", f"{s3_bucket}/corpus", "--out", str(out), *FLAGS]
    log = tmp_path / "log"
    job = cluster.launch(*flags, log=log)
    wait_until(lambda: (out / "commits").exists() and len(list((out / "commits").iterdir())) >= 2, "two commits", job)
    job.kill()
    job.wait()
    assert cluster.launch(*flags, log=log).wait(timeout=DEADLINE_S) == 0, log.read_text()[-3000:]
    assert set(proxy.injected) == set(FAULTS) and sum(proxy.injected.values()) >= 16
    assert "files are embedded already and skipped" in log.read_text()

    local = embed_here(encoder, corpus, tmp_path / "local", window_s=2)
    tables = [EmbeddingSet.open(path).read().sort_by("id") for path in (out, local)]
    assert tables[0].drop(["embedding"]).equals(tables[1].drop(["embedding"]))
    vectors = [column_to_vectors(table["embedding"]) for table in tables]
    assert (1 - (vectors[0] * vectors[1]).sum(axis=1)).max() < 1e-5
    failures = [EmbeddingSet.open(path).failures()["uri"].to_pylist() for path in (out, local)]
    assert sorted(failures[0]) == sorted(failures[1])
    run = read_json(out / "run.json")
    assert run["inputs"] == run["embedded"] + run["failed"] == 46


@pytest.mark.slow
def test_an_object_that_cannot_be_read_is_a_failure_row_until_it_can(
    cluster: EmbedCluster,
    proxy: FaultyS3,
    encoder: Path,
    corpus: Path,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(0)
    clips = sorted(corpus.glob("*/*.wav"))[:4]
    for name, clip in zip(("a.wav", "unlucky.wav", "b.wav", "c.wav"), clips, strict=True):
        (to_path(s3_bucket) / "corpus" / name).write_bytes(clip.read_bytes())
    out = f"{s3_bucket}/out"
    flags = ["--encoder", str(encoder), "--corpus", f"{s3_bucket}/corpus", "--out", out, *FLAGS]
    monkeypatch.setattr(
        proxy,
        "_choose",
        lambda number, method, path: rng.choice(("503", "cut")) if method == "GET" and "unlucky" in path else None,
    )
    log = tmp_path / "log"
    assert cluster.launch(*flags, log=log).wait(timeout=DEADLINE_S) == 0, log.read_text()[-3000:]
    failures = EmbeddingSet.open(out).failures().to_pylist()
    assert [(row["uri"], row["stage"], row["error_class"]) for row in failures] == [
        ("unlucky.wav", "read", "ReadFailed")
    ]
    assert set(EmbeddingSet.open(out).read()["uri"].to_pylist()) == {"a.wav", "b.wav", "c.wav"}

    monkeypatch.setattr(proxy, "_choose", lambda number, method, path: None)
    assert cluster.launch(*flags, "--retry-failed", log=log).wait(timeout=DEADLINE_S) == 0, log.read_text()[-3000:]
    assert EmbeddingSet.open(out).failures().num_rows == 0
    assert len(set(EmbeddingSet.open(out).read()["uri"].to_pylist())) == 4
