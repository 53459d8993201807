"""`ray_jobs/train.py` end to end on a small corpus: what it writes, what it refuses, what relaunching does."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audiomae.artifacts import runs
from audiomae.errors import ConfigError, UserError
from audiomae.model.encoder import AudioEncoder
from audiomae.storage import walk_files
from audiomae.training.recipe import DataConfig
from ray_jobs import train
from ray_jobs.configs import TrainConfig
from ray_jobs.training import job

ROOT = Path(train.__file__).resolve().parent.parent
RECIPE = str(Path(train.__file__).parent / "recipes" / "debug.yaml")
SMALL = ["--config", RECIPE, "--set", "epochs=2", "--set", "batch_size=8", "--set", "data.val_fraction=0.25"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """24 tones of two classes, and one file that is no audio."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for index in range(24):
        label = ("low", "high")[index % 2]
        time = np.arange(16000 * 2) / 16000
        tone = 0.3 * np.sin(2 * np.pi * (200 if label == "low" else 3000) * time * draw.uniform(0.9, 1.1))
        (folder / label).mkdir(exist_ok=True)
        soundfile.write(folder / label / f"{index:02d}.wav", tone + 0.01 * draw.normal(size=len(time)), 16000)
    (folder / "low" / "broken.wav").write_text("not audio at all")
    return folder


def run(corpus: Path, storage: Path, name: str, *more: str) -> int:
    return train.main([*SMALL, *more, "--corpus", str(corpus), "--storage", str(storage), "--name", name])


@pytest.fixture(scope="module")
def finished(ray_cluster, corpus, tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    assert run(corpus, storage, "first") == 0
    return storage / "first"


def test_a_run_leaves_an_encoder_its_records_and_a_receipt(finished):
    encoder = AudioEncoder.load(finished / "encoder", device="cpu")
    receipt = runs.read_finished(finished)
    assert receipt["fingerprint"] == encoder.fingerprint
    assert receipt["step"] == 4 and receipt["clips"] == 24 and receipt["failed_files"] == 1
    vectors = encoder.embed([np.zeros(16000, np.float32) + 1e-3, np.ones(32000, np.float32)])
    assert vectors.shape == (2, encoder.dim)
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    for gauge in ("loss", "mae", "contrastive", "lr", "grad_norm", "clips_per_s", "data_wait_share", "val_mAP"):
        assert np.isfinite(records[-1][gauge]), gauge
    assert "batch_size: 8" in (finished / "config.yaml").read_text()


def test_the_records_are_in_tensorboard_too(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {"mae", "contrastive", "lr", "val_mAP", "val_R@1", "rankme"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([r["loss"] for r in records])


def test_only_the_best_and_the_last_checkpoint_are_kept(finished):
    kept = sorted(path.name for path in finished.glob("checkpoint_0*"))
    assert kept[-1] == "checkpoint_00000004" and len(kept) <= 2


def test_relaunching_a_finished_run_says_so_and_does_nothing(finished, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run(corpus, finished.parent, "first") == 0
    assert "already finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_another_config_under_the_same_name_is_refused_with_what_differs(finished, corpus):
    with pytest.raises(ConfigError, match=r"optim.lr: 0.002 -> 0.5"):
        run(corpus, finished.parent, "first", "--set", "optim.lr=0.5")


def test_features_are_decoded_once_for_all_runs_on_a_corpus(finished, corpus, capsys, monkeypatch):
    from ray_jobs.training import feature_cache

    def no_decoding(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(feature_cache, "_extract", no_decoding)
    root, listing = feature_cache.list_files(str(corpus), DataConfig())
    features = AudioEncoder.load(finished / "encoder", device="cpu").config.features
    _, clips = feature_cache.build_cache(str(finished.parent / "features"), root, listing, features, 10.0)
    assert len(clips) == 25
    assert "broken.wav" in capsys.readouterr().out


def test_a_resumed_run_does_not_list_its_corpus_again(finished, corpus, capsys, monkeypatch):
    class Listed(Exception):
        pass

    def listing(*_: object) -> None:
        raise Listed

    monkeypatch.setattr(job, "list_files", listing)
    features = AudioEncoder.load(finished / "encoder", device="cpu").config.features
    config = TrainConfig.model_validate({"corpus": str(corpus), "storage": str(finished.parent), "name": "first"})
    prepared = job._prepare(finished, config, features)
    assert (prepared.clips, prepared.failed_files) == (24, 1) and Path(prepared.cache).is_dir()
    assert "not listed again" in capsys.readouterr().out
    with pytest.raises(Listed):  # another corpus: it is compared with what the run began with
        job._prepare(finished, config.model_copy(update={"corpus": f"{corpus}/low"}), features)
    receipt = next(Path(prepared.cache).glob("*[0-9].json"))
    receipt.rename(receipt.with_suffix(".away"))
    try:
        with pytest.raises(Listed):  # features that are gone are made again
            job._prepare(finished, config, features)
    finally:
        receipt.with_suffix(".away").rename(receipt)


@pytest.mark.slow
def test_an_elastic_range_of_workers(ray_cluster, corpus, tmp_path):
    assert run(corpus, tmp_path, "elastic", "--set", "workers.num=[1, 2]", "--set", "epochs=1") == 0
    assert AudioEncoder.load(tmp_path / "elastic" / "encoder").dim == 64


@pytest.mark.slow
def test_storage_on_s3(s3_bucket, corpus):
    """A job of its own: its workers must inherit the S3 endpoint from the environment."""
    flags = [*SMALL, "--corpus", str(corpus), "--storage", f"{s3_bucket}/runs", "--name", "first"]
    for said in ("trained: s3://", "already finished: s3://"):
        job = subprocess.run(
            [sys.executable, "ray_jobs/train.py", *flags], cwd=ROOT, check=True, capture_output=True, text=True
        )
        assert said in job.stdout
    names = {name for name, _ in walk_files(f"{s3_bucket}/runs/first")}
    assert {"encoder/config.json", "encoder/model.safetensors", "metrics.jsonl", "train.json"} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert AudioEncoder.load(f"{s3_bucket}/runs/first/encoder", device="cpu").dim == 64


@pytest.mark.parametrize("source", ["missing", "empty"])
def test_a_missing_or_empty_corpus_is_named(tmp_path, ray_cluster, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=source):
        run(tmp_path / source, tmp_path / "runs", "x")


def test_a_corpus_without_audio_fails_with_the_reasons(ray_cluster, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.wav").write_text("no audio")
    with pytest.raises(UserError, match="not one of 1 files"):
        run(tmp_path / "corpus", tmp_path / "runs", "x")
    assert "not decoded: a.wav" in capsys.readouterr().out


def test_a_misspelt_key_names_its_neighbour(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"batchsize.*did you mean 'batch_size'"):
        run(corpus, tmp_path, "x", "--set", "batchsize=3")


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_job_with_step_clips_and_checkpoint(ray_cluster, corpus, tmp_path):
    """A rate of 1e30 overflows the weights in the first steps."""
    with pytest.raises(UserError) as error:
        run(corpus, tmp_path, "x", "--set", "optim.lr=1e30", "--set", "optim.clip_grad=null", "--set", "epochs=3")
    text = str(error.value)
    assert "not finite" in text and "at step" in text and ".wav" in text and "last good checkpoint" in text
    assert not (tmp_path / "x" / "train.json").exists()


def test_what_stopped_training_is_an_error_of_the_job(ray_cluster, corpus, tmp_path, monkeypatch):
    stop = {"step": 7, "loss": float("nan"), "clips": ["low/00.wav", "high/01.wav"]}
    ended = SimpleNamespace(return_value=stop, checkpoint=SimpleNamespace(path="runs/x/checkpoint_00000004"))
    monkeypatch.setattr(job, "_fit", lambda *_: ended)
    with pytest.raises(
        UserError, match=r"at step 7; clips of that step: low/00.wav, high/01.wav; .*checkpoint_00000004"
    ):
        run(corpus, tmp_path, "x")
    assert not (tmp_path / "x" / "train.json").exists()
