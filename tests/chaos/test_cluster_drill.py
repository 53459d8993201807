"""The whole line on nodes that share nothing but a bucket; in each stage a node dies and another joins.

Beside it an undisturbed run of the same on the same cluster: in the end both releases hold the same.
"""

import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from conftest import ROOT, another_cluster
from drill import DEADLINE_S, Drill, three_nodes

from audiomae.artifacts.embeddings import EmbeddingSet, column_to_vectors
from audiomae.client import AudioClient
from audiomae.corpus.synthetic import generate
from audiomae.errors import UserError
from audiomae.search.audio_index import AudioIndex
from audiomae.storage import copy_tree, list_names, read_bytes, read_json, to_path
from ray_jobs import embed_corpus, train
from serve.proxy import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CLIPS, EPOCHS, EVERY = 24, 6, 1
TRAINING = {
    "epochs": EPOCHS,
    "batch_size": 8,
    "workers.num": 2,
    "validation.every_epochs": EPOCHS,
    "checkpoint.every_epochs": EVERY,
}
REPLICA = "ServeReplica:search:Api"
DEBUG = str(ROOT / "ray_jobs" / "recipes" / "debug.yaml")


def recipe(bucket: str) -> list[str]:
    sets = {**TRAINING, "data.cache": f"{bucket}/features"}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    return ["--config", DEBUG, *words, "--corpus", f"{bucket}/corpus"]


def checkpoint_step(run: Any) -> int:
    """Of the last checkpoint that Ray Train knows of; 0 before the first."""
    try:
        latest = read_json(run / "checkpoint_manager_snapshot.json")["latest_checkpoint_result"]
        return int(latest["checkpoint_dir_name"].rpartition("_")[2])
    except (OSError, ValueError, TypeError):
        return 0


def test_every_stage_loses_a_node_and_the_release_is_the_same(
    s3_server: str, s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = generate(tmp_path / "corpus", num_clips=CLIPS)
    (corpus / "listing.csv").unlink()
    copy_tree(corpus, f"{s3_bucket}/corpus")
    hurt, calm = to_path(f"{s3_bucket}/hurt"), to_path(f"{s3_bucket}/calm")
    with another_cluster(), three_nodes(tmp_path, delay_s=0.2) as drill:
        a_local_folder_is_refused(drill, s3_bucket)
        flags = ["--embed.window-s", "2", "--embed.shard-minutes", "0.15", "--label", "none"]  # nothing to evaluate
        drill.finish(drill.launch("pipeline.py", *recipe(s3_bucket), "--out", str(calm), *flags), "undisturbed")
        train_hurt(drill, s3_bucket, hurt)
        embed_hurt(drill, s3_bucket, hurt)
        index_hurt(drill, hurt)
        serve_hurt(drill, hurt)
        assert_same(hurt, calm)
        left = sorted(path.name for path in drill.disk.iterdir())
        with capsys.disabled():
            print(f"\n{drill.report().read_text()}")
    assert left == []  # nothing was written where other nodes cannot see it


def a_local_folder_is_refused(drill: Drill, bucket: str) -> None:
    ray.init(drill.cluster.address, log_to_driver=False, logging_level="warning")
    try:
        flags = ["--encoder", f"{bucket}/none", "--corpus", f"{bucket}/corpus", "--out", str(drill.disk / "out")]
        with pytest.raises(UserError, match=r"--out .*disk/out is on a disk of .* does not see; put it on s3://"):
            embed_corpus.main(flags)
        with pytest.raises(UserError, match=r"--storage .*does not see"):
            train.main([*recipe(bucket), "--storage", str(drill.disk / "runs"), "--name", "run"])
    finally:
        ray.shutdown()
    drill.note("probe", "local --out and --storage refused")


def train_hurt(drill: Drill, bucket: str, out: Any) -> None:
    """A node dies after the first checkpoint; later the job itself is stopped, and the same command goes on."""
    run = out / "train"
    line = ["train.py", *recipe(bucket), "--storage", str(out), "--name", "train"]
    job = drill.launch(*line)
    drill.wait(lambda: checkpoint_step(run) > 0, "the first checkpoint", job)
    killed_at = checkpoint_step(run)
    drill.lose_node_with("RayTrainWorker", "train", job)
    drill.wait(lambda: checkpoint_step(run) > killed_at, "a checkpoint after the loss of a node", job)
    drill.note("train", f"checkpoint {checkpoint_step(run)} after {killed_at}, by itself")
    job.send_signal(signal.SIGTERM)  # as `ray job stop` does
    job.wait(timeout=DEADLINE_S)
    stopped_at = checkpoint_step(run)
    assert not (run / "train.json").exists()
    drill.note("train", f"stopped at checkpoint {stopped_at}")
    drill.finish(drill.launch(*line), "train")
    steps = [json.loads(text)["epoch"] for text in read_bytes(run / "metrics.jsonl").splitlines()]
    assert steps == list(range(1, EPOCHS + 1)) and 0 < killed_at < stopped_at


def embed_hurt(drill: Drill, bucket: str, out: Any) -> None:
    folder = out / "embeddings"
    line = ["--encoder", str(out / "train" / "encoder"), "--corpus", f"{bucket}/corpus", "--out", str(folder)]
    job = drill.launch("embed_corpus.py", *line, "--window-s", "2", "--shard-minutes", "0.15")
    drill.wait(lambda: len(list_names(folder / "commits")) >= 2, "two commits", job)
    drill.lose_node_with("MapWorker", "embed", job)
    drill.finish(job, "embed")


def index_hurt(drill: Drill, out: Any) -> None:
    line = ["--embeddings", str(out / "embeddings"), "--encoder", str(out / "train" / "encoder")]
    job = drill.launch("build_index.py", *line, "--out", str(out / "index"))
    drill.lose_node_with("write_rows", "index", job)
    drill.finish(job, "index")


def serve_hurt(drill: Drill, out: Any) -> None:
    """A node with a replica dies under requests: every one is answered, and as before."""
    (port,) = free_ports(1)
    service = drill.serve(f"index={out / 'index'}", f"port={port}", "api_replicas=2", "encoder_threads=1")
    query = EmbeddingSet.open(out / "embeddings").vectors()[:1].tolist()
    answers: list[list[tuple[int, float]]] = []
    wrong: list[Exception] = []
    enough = threading.Event()

    def ask() -> None:
        with AudioClient(f"http://127.0.0.1:{port}", deadline_s=DEADLINE_S) as client:
            while not enough.is_set():
                try:
                    (found,) = client.search_vectors(query, k=5)
                    answers.append([(hit.id, hit.score) for hit in found])
                except Exception as error:
                    wrong.append(error)

    people = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for person in people:
        person.start()
    drill.wait(lambda: len(answers) >= 5, "five answers", service)
    drill.lose_node_with(REPLICA, "serve", service)
    drill.wait(lambda: len(drill.nodes_with(REPLICA)) >= 2, "two replicas", service)
    many = len(answers)
    drill.wait(lambda: len(answers) >= many + 5, "answers after the loss of a node", service)
    enough.set()
    for person in people:
        person.join()
    assert not wrong, wrong[0]
    assert all(answer == answers[0] for answer in answers)
    drill.note("serve", f"{len(answers)} requests, all answered and alike")


def assert_same(hurt: Any, calm: Any) -> None:
    sets = [EmbeddingSet.open(out / "embeddings") for out in (hurt, calm)]
    tables = [found.read().sort_by("id") for found in sets]
    assert all(found.complete for found in sets) and len(set(tables[0]["id"].to_pylist())) == tables[0].num_rows
    assert tables[0].drop(["embedding"]).equals(tables[1].drop(["embedding"]))
    vectors = [column_to_vectors(table["embedding"]) for table in tables]
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=0, atol=1e-5)
    indexes = [AudioIndex.open(str(out / "index")) for out in (hurt, calm)]
    found = [index.search(vectors[1], k=5) for index in indexes]
    assert len(indexes[0]) == len(indexes[1]) == len(vectors[0])
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=0, atol=1e-5)
    items = [index.table.table.sort_by([("uri", "ascending"), ("start_s", "ascending")]) for index in indexes]
    assert items[0].equals(items[1])
